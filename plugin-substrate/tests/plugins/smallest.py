"""Plugins that leave to their base class whatever they can."""

from __future__ import annotations

from dataclasses import dataclass

from plugin_substrate.interface import PluginInterface


class Smallest(PluginInterface):
    name = "smallest"
    version = "1.0"

    def execute(self, *parts):
        return list(parts)


@dataclass
class Limits:
    rows: int = 10
    unit: str = "kg"


class Configured(Smallest):
    config_class = Limits

    def execute(self):
        return self.config


class Forgetful(Smallest):
    """Takes its configuration over by itself, and does not say which that is."""

    def initialize(self, config):
        self.rows = config.get("rows")
