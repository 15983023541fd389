"""A OneNET simulator for development and tests: an HTTP server that follows the documented API and injects faults.

It shares no code with the worker, so that one mistake cannot be in both and stay hidden.
"""
