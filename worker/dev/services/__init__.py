"""What the demo and the tests need around the worker, found on this machine or started by itself, and stopped again."""
