"""Admission and settlement: the two doors between deciding and doing."""
