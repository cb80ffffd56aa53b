"""A plugin for tests whose effects are files in a folder, one per step key."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import PluginInterface, plugin_action


class Journal(PluginInterface):
    name = "journal"
    version = "0.1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        pass

    def get_config_schema(self) -> dict[str, Any]:
        return {}

    def get_current_config(self) -> dict[str, Any]:
        return {}

    def execute(self, *, action: str, **arguments: Any) -> Any:
        return self.run_action(action, **arguments)

    @plugin_action("journal.write")
    def write(self, journal: str, label: str, seconds: float = 0, note: Any = None) -> Any:
        """Have the effect unless this step had it; then wait while the file `<label>.closed` is there."""
        folder = Path(journal)
        (folder / f"{label}.effect.{self.call.step_key.replace('/', '.')}").touch()
        self.report_progress(0.5, "the effect is there")
        self.report_usage({"line": 1.0})
        (folder / f"{label}.entered").touch()
        time.sleep(seconds)  # the work
        while (folder / f"{label}.closed").exists():
            self.check_cancel()
            time.sleep(0.01)
        return {"label": label, "step_key": self.call.step_key}

    @plugin_action("journal.refuse")
    def refuse(self) -> Any:
        raise PluginInputError("there is nothing to write")

    @plugin_action("journal.sign")
    def sign(self, journal: str, label: str) -> Any:
        return self.write(journal, label)
