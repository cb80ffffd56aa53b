"""The engine's test kit. Its pytest plugin is registered when plm-engine-core is installed.

Nothing is imported here, because pytest loads this package at every start.
"""

from __future__ import annotations

__all__: list[str] = []
