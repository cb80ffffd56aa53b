"""The plugin."""

from __future__ import annotations

from typing import Any

from plugin_substrate.interface import PluginInterface


class NoopPlugin(PluginInterface):
    """Answers at once."""

    @property
    def name(self) -> str:
        return "noop"

    @property
    def version(self) -> str:
        return "1.0.0"

    def initialize(self, config: dict[str, Any]) -> None:
        """Nothing to prepare."""

    def execute(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def get_config_schema(self) -> dict[str, Any]:
        """No configuration."""
        return {}

    def get_current_config(self) -> dict[str, Any]:
        """No configuration."""
        return {}
