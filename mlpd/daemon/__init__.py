"""The daemon: one verb per module, and the one place that builds, starts and stops everything."""
