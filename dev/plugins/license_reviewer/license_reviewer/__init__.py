"""Reviews the licenses of a bill of materials; the plugin class is in `license_reviewer.plugin`."""

from __future__ import annotations

__all__: list[str] = []
