"""HTTP edge: one route table, handlers, wire formats, error mapping."""
