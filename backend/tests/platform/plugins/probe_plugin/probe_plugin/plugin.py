"""A plugin for tests: each action shows one behaviour of plugins, good or bad."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from plugin_substrate.errors import (
    PluginFatalError,
    PluginInputError,
    PluginResourceError,
    PluginTransientError,
)
from plugin_substrate.interface import InputFile, OutputFile, PluginInterface, current_call, plugin_action

ERRORS = {
    "user_input": PluginInputError,
    "transient": PluginTransientError,
    "resource": PluginResourceError,
    "fatal": PluginFatalError,
}

REMEMBERED: list[str] = []
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
NONSENSE = {
    "a number that is none": float("nan"),
    "an object": object(),
    "a set": {1},
    "a list that holds itself": CYCLE,
    "a text with NUL": {"text": "a\0b"},
    "half a surrogate pair": {"text": "\ud800"},
    "a name that is no text": {1: "one"},
    "bytes": b"\xff",
}


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Probe(PluginInterface):
    name = "probe"
    version = "0.1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        pass

    def get_config_schema(self) -> dict[str, Any]:
        return {}

    def get_current_config(self) -> dict[str, Any]:
        return {}

    def execute(self, *, action: str, **arguments: Any) -> Any:
        return self.run_action(action, **arguments)

    @plugin_action("probe.echo")
    def echo(self, value: Any = None) -> Any:
        self.report_progress(0.5, "half way")
        self.report_progress(1.0, "done")
        return {"value": value}

    @plugin_action("probe.fail")
    def fail(self, kind: str) -> Any:
        raise ERRORS[kind](f"this is a {kind} error")

    @plugin_action("probe.usage")
    def usage(self, unit: str, amount: str) -> Any:
        current_call.get().on_usage({unit: float(amount)})  # around the interface's own check
        return {}

    @plugin_action("probe.make_file")
    def make_file(self, name: str, mime_type: str, text: str) -> Any:
        return {"file": OutputFile(name, mime_type, text.encode())}

    @plugin_action("probe.read_file")
    def read_file(self, file: InputFile) -> Any:
        return {"name": file.name, "mime_type": file.mime_type, "text": file.data.decode()}

    @plugin_action("probe.hold")
    def hold(self, gate: str, beat: bool = False) -> Any:
        """Say that it was entered, then wait until the file `gate` exists, on request with a report at every look."""
        Path(f"{gate}.entered").touch()
        while not Path(gate).exists():
            self.check_cancel()
            if beat:
                self.report_progress(0.5, "at the gate")
            time.sleep(0.02)
        return {"held": True}

    @plugin_action("probe.short")
    def short(self, gate: str) -> Any:
        return self.hold(gate)

    @plugin_action("probe.stubborn")
    def stubborn(self, gate: str) -> Any:
        """Like `hold`, deaf to cancels."""
        Path(f"{gate}.entered").touch()
        while not Path(gate).exists():
            time.sleep(0.02)
        return {"held": True}

    @plugin_action("probe.journal")
    def journal(self, journal: str) -> Any:
        """Write one line a step key, and die before answering the first time."""
        known = Path(journal)
        with known.open("a+", encoding="utf-8") as lines:
            lines.seek(0)
            if self.call.step_key not in lines.read().splitlines():
                lines.write(f"{self.call.step_key}\n")
                lines.flush()
                os._exit(7)
        return {"step_key": self.call.step_key}

    @plugin_action("probe.die")
    def die(self) -> Any:
        os._exit(9)

    @plugin_action("probe.write")
    def write(self, value: Any = None) -> Any:
        return {"written": value}

    @plugin_action("probe.blocked")
    def blocked(self) -> Any:
        return {"reached": True}

    @plugin_action("probe.steered")
    def steered(self) -> Any:
        return {"reached": True}

    @plugin_action("probe.remember")
    def remember(self, value: str) -> Any:
        """What earlier calls left in this process and in its folder; then leave something there too."""
        journal = self.data_dir / "remembered"
        found = {"memory": list(REMEMBERED), "file": journal.read_text() if journal.exists() else ""}
        REMEMBERED.append(value)
        journal.write_text(value)
        return {**found, "pid": os.getpid()}

    @plugin_action("probe.nonsense")
    def nonsense(self, what: str) -> Any:
        return NONSENSE[what]

    @plugin_action("probe.misbehave")
    def misbehave(self, how: str) -> Any:
        if how == "raise":
            raise RuntimeError("this plugin has a defect")
        if how == "raise without words":
            raise Unprintable
        if how == "leave":
            sys.exit(3)
        if how == "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "flood":
            for number in range(20_000):
                self.report_progress(number / 20_000, "x" * 1000)
                sys.stdout.write("x" * 1000 + "\n")
            return {"flooded": True}
        return {"text": "x" * int(how)}
