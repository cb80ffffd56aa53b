"""The test kit: real databases in about 50 ms each. Its pytest plugin is registered when plm-shared is installed.

``plm_shared.testing.databases`` holds the parts for building further fixtures; nothing is imported here, because
pytest loads this package at every start.
"""

from __future__ import annotations

__all__: list[str] = []
