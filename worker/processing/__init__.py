"""The engine: the way of one command; knows no broker and no HTTP."""
