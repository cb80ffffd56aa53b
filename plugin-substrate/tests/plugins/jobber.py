"""What the tests of the queue run: work with effects that can be counted afterwards, in whichever process it ran."""

from __future__ import annotations

import os
import time

from plugin_substrate.errors import PluginResourceError, PluginTransientError, ResourceShortfall
from plugin_substrate.interface import PluginInterface, plugin_action


class Jobber(PluginInterface):
    name = "jobber"
    version = "1.0"

    def initialize(self, config):
        self.attempts = 0

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return {}

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    @plugin_action("job.value")
    def value(self, value=None):
        return value

    @plugin_action("job.key")
    def key(self):
        return self.call.step_key

    @plugin_action("job.pid")
    def pid(self):
        return os.getpid()

    @plugin_action("job.bytes")
    def bytes(self, count):
        return b"x" * count

    @plugin_action("job.effect")
    def effect(self, name):
        """Write one whole line, and tell of it."""
        descriptor = os.open(self.data_dir / "effects", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{name}\n".encode())
        os.close(descriptor)
        return name

    @plugin_action("job.steps")
    def steps(self, count, lines=0):
        for line in range(lines):
            print(f"line {line}")  # noqa: T201 - what is tested
        for step in range(count):
            self.report_progress((step + 1) / count, f"step {step + 1}")
        return count

    @plugin_action("job.flaky")
    def flaky(self, failures, after=None):
        """Fails in passing, so many times."""
        self.attempts += 1
        if self.attempts <= failures:
            raise PluginTransientError(f"attempt {self.attempts}", retry_after_seconds=after)
        return self.attempts

    @plugin_action("job.hungry")
    def hungry(self):
        """Finds too little memory in the first worker of its data folder, and enough in the next."""
        first = self.data_dir / "first"
        if not first.exists():
            first.write_text(str(os.getpid()))
        if first.read_text() == str(os.getpid()):
            raise PluginResourceError("too little", resource_shortfall=ResourceShortfall("memory_mb", 2.0, 1.0))
        return "enough"

    @plugin_action("job.silent")
    def silent(self):
        self.report_progress(0.5, "and no further")
        while True:
            self.check_cancel()
            time.sleep(0.001)

    @plugin_action("job.sleep")
    def sleep(self, seconds):
        time.sleep(seconds)
        return seconds

    @plugin_action("job.gated")
    def gated(self, name):
        """Write a line, tell of it, and go on until a file lets it end."""
        self.effect(name)
        self.report_progress(0.25, f"did {name}")
        while not (self.data_dir / f"go-{name}").exists():
            self.check_cancel()
            time.sleep(0.001)
        return name

    @plugin_action("job.keyed_effect")
    def keyed_effect(self):
        return self.effect(self.call.step_key)
