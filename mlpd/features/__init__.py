"""Feature store engine: ingest, online reads, point-in-time joins, windows, transforms."""
