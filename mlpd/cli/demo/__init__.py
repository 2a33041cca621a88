"""The demo: a year of real flights through a real daemon, as a user would do it."""
