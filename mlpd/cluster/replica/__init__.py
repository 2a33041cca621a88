"""Followers: a daemon that has what another one has, and may take its place."""
