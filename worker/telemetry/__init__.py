"""How the worker is watched."""
