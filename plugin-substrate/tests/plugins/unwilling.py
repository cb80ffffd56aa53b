"""A plugin whose import does what a template cannot live with, as a file in its folder tells."""

# ruff: noqa: T201 - printing is what is tested
from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from plugin_substrate.interface import PluginInterface

_really_fork = os.fork
_really_wait = os.waitpid


def hang():
    print("importing for ever")
    time.sleep(1000)


def fail():
    raise ImportError("libmissing.so: cannot open shared object file")


def leave():
    print("leaving")
    os._exit(3)


def start_a_thread():
    threading.Thread(target=threading.Event().wait, name="background", daemon=True).start()


def fork():
    os.fork()


def take_long():
    for step in range(6):
        time.sleep(0.25)
        PluginInterface.report_progress(None, step / 10, f"step {step}")


def fork_greedily():
    """Take every fork that can be had, and let none of them become a worker."""

    def greedy():
        for _ in range(10):
            try:
                child = _really_fork()
            except PermissionError:
                continue
            if child == 0:
                with Path("forked").open("a") as file:
                    file.write("x")
                time.sleep(1000)
        time.sleep(1000)

    os.fork = greedy


def refuse_the_tie():
    """Become a worker's process without having its end tied to its supervisor's."""
    from plugin_substrate.worker import confine

    def live_on(*_):
        Path("untied").touch()
        time.sleep(1000)

    confine.confine_forked_worker = live_on


deed = Path("deed")
if deed.is_file():
    globals()[deed.read_text()]()


class Unwilling(PluginInterface):
    name = "unwilling"
    version = "1.0"

    def initialize(self, config):
        self.config = config

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return self.config

    def execute(self):
        return os.getpid()
