"""Tools for development: the demo, and private servers for demo, tests and benchmark."""
