"""Frozen contracts, the ledger and tenant isolation: what every other package agrees on."""

from importlib.metadata import version

__version__ = version("plm-shared")

__all__ = ["__version__"]
