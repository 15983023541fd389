"""Fuzzing with a budget of time: whatever arrives, each thing harms itself only. ``make fuzz`` runs it."""
