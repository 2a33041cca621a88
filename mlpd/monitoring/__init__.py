"""Monitoring engine: metrics, live counts, drift, label performance, consistency, freshness."""
