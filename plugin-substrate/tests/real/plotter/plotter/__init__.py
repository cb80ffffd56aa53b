"""Draws charts as PNG: matplotlib."""
