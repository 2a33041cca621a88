"""Command line: one file per group; imports inside the commands so that --help is quick."""
