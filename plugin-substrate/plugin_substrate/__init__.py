"""Plugins as isolated worker processes, and the queue that orders their work on one machine."""
