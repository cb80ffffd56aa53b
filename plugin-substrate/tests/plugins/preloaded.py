"""A plugin that tells in which process its module was imported, and what a copy of that process has."""

# ruff: noqa: T201 - printing is what is tested
from __future__ import annotations

import logging
import os
import socket
import stat
import sys
import threading
from contextlib import suppress
from pathlib import Path

from plugin_substrate.interface import PluginInterface, plugin_action

IMPORTED_BY = os.getpid()
IMPORTED_WITH = dict(os.environ)
KEPT: list[str] = []

print("imported")


class Preloaded(PluginInterface):
    name = "preloaded"
    version = "1.0"

    def initialize(self, config):
        self.config = config

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return self.config

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    @plugin_action("preloaded.where")
    def where(self):
        return {"imported_by": IMPORTED_BY, "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0)}

    @plugin_action("preloaded.have")
    def have(self, keep=""):
        """What this process has, and what earlier calls in it have kept."""
        KEPT.append(keep)
        return {
            "descriptors": open_descriptors(),
            "environment": dict(os.environ),
            "at import": IMPORTED_WITH,
            "folder": str(Path.cwd()),
            "config": self.config,
            "kept": KEPT[:-1],
        }

    @plugin_action("preloaded.say")
    def say(self, text):
        print(text)
        logging.getLogger("preloaded").warning(text)
        os.write(2, f"{text}\n".encode())

    @plugin_action("preloaded.attempt")
    def attempt(self):
        """What a worker may not do, copied or not: the error of each."""
        outcome = {}
        for name, act in {
            "fork": os.fork,
            "spawn": lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
            "socket": lambda: socket.socket(socket.AF_INET),
            "signal to the supervisor": lambda: os.kill(os.getppid(), 0),
            "signal to the template": lambda: os.kill(IMPORTED_BY, 0),
        }.items():
            try:
                act()
            except OSError as error:
                outcome[name] = type(error).__name__
            else:
                outcome[name] = "done"
        return outcome

    @plugin_action("preloaded.threads")
    def threads(self):
        threads = [threading.Thread(target=lambda: None) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(threads)

    @plugin_action("preloaded.abort")
    def abort(self):
        os.abort()


def open_descriptors():
    found = []
    for number in range(256):
        with suppress(OSError):
            found.append((number, stat.S_IFMT(os.fstat(number).st_mode) == stat.S_IFSOCK))
    return found
