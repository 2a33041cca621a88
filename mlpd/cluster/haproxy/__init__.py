"""HAProxy in front of the shards: its configuration, and following the map at run time."""
