"""Sync and async client over TCP or a unix socket."""
