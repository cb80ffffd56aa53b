"""A plugin for tests whose effect happens again whenever it is called again."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from plugin_substrate.interface import PluginInterface, plugin_action


class Fragile(PluginInterface):
    name = "fragile"
    version = "0.1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        pass

    def get_config_schema(self) -> dict[str, Any]:
        return {}

    def get_current_config(self) -> dict[str, Any]:
        return {}

    def execute(self, *, action: str, **arguments: Any) -> Any:
        return self.run_action(action, **arguments)

    @plugin_action("fragile.append")
    def append(self, journal: str) -> Any:
        """Append a line; die before answering when it is the first one."""
        with Path(journal).open("a+", encoding="utf-8") as lines:
            lines.seek(0)
            first = not lines.read()
            lines.write("effect\n")
            lines.flush()
            if first:
                os._exit(7)
        return {"appended": True}

    @plugin_action("fragile.hang")
    def hang(self, gate: str) -> Any:
        """Wait until the file `gate` exists, deaf to cancels."""
        while not Path(gate).exists():
            time.sleep(0.02)
        return {"held": True}
