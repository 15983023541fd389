"""Waiting for something that must happen."""

PATIENCE_S = 40  # the longest wait for something that must happen; no test needs that long
