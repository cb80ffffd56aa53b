"""Frozen contracts, the ledger's schema and tenant isolation: what every other package of the platform stands on.

Import from the modules; only the version lives here, so that importing one contract never loads a driver.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0+platform"
