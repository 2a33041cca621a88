"""Feature store engine: definitions, ingest, online reads, point-in-time joins, windows, transforms."""
