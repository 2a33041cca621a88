"""The router: a daemon's API over all shards of a cluster; docs/paths/router.md."""
