"""Plugins as authors write them, for the tests of the test kit; these may be imported in the tests' process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from plugin_substrate.errors import PluginConfigError
from plugin_substrate.interface import PluginInterface, plugin_action


class Sample(PluginInterface):
    name = "sample"
    version = "1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        if config["unit"] == "stone":
            raise PluginConfigError("nobody weighs in stones", fields_invalid=["unit"])
        self.config = config

    def get_config_schema(self) -> dict[str, Any]:
        unit = {"type": "string", "minLength": 1, "default": "kg"}
        return {"type": "object", "properties": {"unit": unit}}

    def get_current_config(self) -> dict[str, Any]:
        return self.config

    def execute(self, action: str, **arguments: Any) -> Any:
        return self.run_action(action, **arguments)

    def execute_stream(self, upto: int, broken: bool = False) -> Iterator[object]:
        try:
            for step in range(upto):
                self.report_progress(step / upto, f"step {step}")
                yield {"step": step, "weight": {1} if broken and step == 2 else 1.0}
        finally:
            print("closed")  # noqa: T201 - printing is what is tested

    def cancel(self) -> None:
        self.heard_cancel = self.call.call_id

    @plugin_action("sample.count")
    def count(self, upto: int) -> int:
        for step in range(upto):
            self.report_progress(step / upto, f"step {step}")
            self.check_cancel()
        return upto

    @plugin_action("sample.talk")
    def talk(self, fail: bool = False) -> None:
        print("printed")  # noqa: T201 - printing is what is tested
        logging.getLogger("sample").info("logged")
        print("unfinished", end="", file=sys.stderr)  # noqa: T201
        if fail:
            raise ValueError("no more words")

    @plugin_action("sample.pid")
    def pid(self) -> int:
        return os.getpid()

    @plugin_action("sample.library")
    def library(self) -> str:
        """Use a library of the test's own environment."""
        import yaml

        return str(yaml.safe_dump({"a": 1}))

    @plugin_action("sample.child")
    def child(self) -> int:
        """Leave a process running when the call is over."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid

    @plugin_action("sample.interpreter")
    def interpreter(self) -> str:
        """Start Python as multiprocessing starts its helpers: with this process's flags."""
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        script = "import yaml; print(yaml.safe_dump([1]))"
        done = subprocess.run([sys.executable, *flags, "-c", script], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr


def get_plugin_metadata() -> dict[str, Any]:
    return {
        "name": "sample",
        "version": "1.0",
        "description": "Shows what the test kit can do.",
        "module": "kit_sample",
        "class": "Sample",
        "interface": "plugin_substrate.interface.PluginInterface",
        "config_schema": Sample().get_config_schema(),
        "isolation": {"processes": 2},
        "stateless": True,
    }
