"""Streams of every kind for the tests."""

from __future__ import annotations

import time
from pathlib import Path

from plugin_substrate.errors import PluginInputError, PluginResourceError, ResourceShortfall
from plugin_substrate.interface import PluginInterface


class Streamer(PluginInterface):
    name = "streamer"
    version = "1.0"

    def initialize(self, config):
        self.config = config
        self.ended = False

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return self.config

    def execute(self, kind="", **arguments):
        if kind == "ended":
            return self.ended
        if kind == "resident":
            pages = Path("/proc/self/statm").read_text().split()[1]
            return int(pages) * 4096
        return kind, arguments

    def execute_stream(self, kind, **arguments):
        return getattr(self, kind)(**arguments)

    def numbers(self, count):
        try:
            yield from range(count)
        finally:
            self.ended = True

    def reported(self, count):
        for number in range(count):
            self.report_progress(-1, str(number))
            yield number

    def blocks(self, count, size):
        for number in range(count):
            yield bytes([number % 256]) * size

    def values(self):
        yield {"a": (1, b"x")}
        yield b"y" * (5 << 20)
        yield None

    def fails(self, after):
        yield from range(after)
        raise PluginResourceError("too big", resource_shortfall=ResourceShortfall("ram", 10, 4))

    def fails_at_once(self):
        raise PluginInputError("bad rows", fields_invalid=["rows"])

    def unencodable(self):
        yield "fine"
        yield {"rows": [1.0, float("nan")]}

    def chatty(self):
        for number in range(3):
            print(f"line {number}")  # noqa: T201 - printing is what is tested
            self.report_progress(number / 3, "on it")
            yield number

    def pauses(self):
        """Sends one chunk and then nothing, until it is cancelled."""
        yield "first"
        while True:
            self.check_cancel()
            time.sleep(0.001)

    def deaf(self):
        yield "first"
        time.sleep(1000)
