"""A OneNET for development and tests: a real HTTP server that behaves like the platform's page, faults included.

It shares no code with the worker, so that an error in one does not agree with an error in the other.
"""
