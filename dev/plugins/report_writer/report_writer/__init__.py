"""Writes the report of a bill review; the plugin class is in `report_writer.plugin`."""

from __future__ import annotations

__all__: list[str] = []
