"""The HTTP edge to OneNET: turns its words, and requests', into ours, and chooses nothing."""
