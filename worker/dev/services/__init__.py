"""Private servers and worker processes, started and stopped by demo, tests and benchmark."""
