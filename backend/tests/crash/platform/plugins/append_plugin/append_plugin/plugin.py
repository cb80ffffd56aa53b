"""A plugin for tests whose effects are files in a folder, one more with every call."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from plugin_substrate.interface import PluginInterface, plugin_action


class Append(PluginInterface):
    name = "append"
    version = "0.1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        pass

    def get_config_schema(self) -> dict[str, Any]:
        return {}

    def get_current_config(self) -> dict[str, Any]:
        return {}

    def execute(self, *, action: str, **arguments: Any) -> Any:
        return self.run_action(action, **arguments)

    @plugin_action("append.write")
    def write(self, journal: str, label: str, seconds: float = 0) -> Any:
        """Have an effect, then wait while the file `<label>.closed` is there."""
        folder = Path(journal)
        (folder / f"{label}.effect.{uuid.uuid4()}").touch()
        self.report_progress(0.5, "the effect is there")
        self.report_usage({"line": 1.0})
        (folder / f"{label}.entered").touch()
        time.sleep(seconds)  # the work
        while (folder / f"{label}.closed").exists():
            self.check_cancel()
            time.sleep(0.01)
        return {"label": label, "step_key": self.call.step_key}
