"""Storage floor: the LMDB environment with its one writer, the log, segments and blobs."""
