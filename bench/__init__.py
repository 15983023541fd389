"""Compares this worker with one that a user would write by hand, on the same broker, commands and platform."""
