"""Modules that run in plugin workers, imported there from this folder; interface and standard library only."""
