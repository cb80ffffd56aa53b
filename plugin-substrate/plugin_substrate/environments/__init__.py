"""Environments of plugins: made, filled and asked about themselves. Needs the ``host`` extra."""
