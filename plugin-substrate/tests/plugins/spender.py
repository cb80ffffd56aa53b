"""A plugin that reports to have used more than there is."""

from __future__ import annotations

import sys

from plugin_substrate.interface import PluginInterface


class Spender(PluginInterface):
    name = "spender"
    version = "1.0"

    def execute(self, number):
        self.report_usage({"money": sys.float_info.max, **{f"unit {number} {index}": 1 for index in range(99)}})
