"""A plugin that takes memory, keeps it or gives it back, and starts processes that take some too."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from plugin_substrate.interface import PluginInterface, plugin_action

MB = 1 << 20
CHILD = "import sys; held = b'x' * (int(sys.argv[1]) << 20); print('ready', flush=True); sys.stdin.read()"


class Eater(PluginInterface):
    name = "eater"
    version = "1.0"

    def initialize(self, config):
        self.held = []
        self.child = None

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return {}

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    def cleanup(self):
        if self.child is not None:
            self.child.kill()

    @plugin_action("eater.keep")
    def keep(self, mb):
        self.held.append(b"x" * (mb * MB))
        return os.getpid()

    @plugin_action("eater.taste")
    def taste(self, mb):
        """Take memory and give it back before the end."""
        return len(b"x" * (mb * MB))

    @plugin_action("eater.child")
    def start_child(self, mb):
        self.child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CHILD, str(mb)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.child.stdout.readline()
        return self.child.pid

    @plugin_action("eater.wait")
    def wait(self):
        self.report_progress(0.5, "running")
        while True:
            self.check_cancel()
            os.sched_yield()

    @plugin_action("eater.usage")
    def usage(self, pages, fail=False):
        self.report_usage({"pages": pages})
        if fail:
            raise ValueError("as asked")
        return pages


class PretendedMonitor(PluginInterface):
    """Tells of GPUs what stands in a file of its folder, as a real monitor tells what a driver says."""

    name = "monitor"
    version = "1.0"

    def initialize(self, config):
        pass

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return {}

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    def get_system_status(self):
        return self._figures()["status"]

    def list_processes(self):
        return self._figures()["processes"]

    def _figures(self):
        return json.loads((self.data_dir / "figures.json").read_text())
