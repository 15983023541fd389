"""The HTTP edge to OneNET: translates between its API and the core's types, and decides nothing."""
