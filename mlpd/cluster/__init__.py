"""The cluster: placing slots, and changing the map of several daemons."""
