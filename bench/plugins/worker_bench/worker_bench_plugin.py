"""What bench/plugin_workers.py loads: actions that do next to nothing, so that what surrounds them is measured."""

from __future__ import annotations

import os
import time
from typing import Any

from plugin_substrate.interface import PluginInterface


class WorkerBench(PluginInterface):
    name = "worker-bench"
    version = "1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        self.config = config

    def get_config_schema(self) -> dict[str, Any]:
        return {}

    def get_current_config(self) -> dict[str, Any]:
        return self.config

    def execute(self, action: str = "nothing", value: Any = None) -> Any:
        if action == "polite":
            self.report_progress(0.0)
            while True:
                self.check_cancel()
                time.sleep(0.001)
        if action == "sleep":
            time.sleep(value)
        if action == "busy":  # in C, with the interpreter held
            self.report_progress(0.0)
            sum(range(10**18))
        if action == "family":
            leave_descendants()
            action = "deaf"
        if action == "deaf":
            self.report_progress(0.0)
            import hashlib  # a megabyte of OpenSSL, which has no place in the load of a trivial plugin

            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)
        return value

    def execute_stream(self, count: int) -> Any:
        for number in range(count):
            yield {"token": "word", "index": number}


def leave_descendants() -> None:
    """A child, one in a session of its own, and a daemon whose parent has ended."""
    for kind in ("child", "apart", "daemon"):
        child = os.fork()
        if child == 0:
            if kind != "child":
                os.setsid()
            if kind == "daemon" and os.fork():
                os._exit(0)
            while True:
                time.sleep(1000)
        if kind == "daemon":
            os.waitpid(child, 0)
