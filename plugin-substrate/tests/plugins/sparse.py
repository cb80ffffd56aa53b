"""A plugin that imports as little as one can, and tells what was imported before it."""

from __future__ import annotations

import sys

from plugin_substrate.interface import PluginInterface

FOUND = frozenset(sys.modules)


class Sparse(PluginInterface):
    name = "sparse"
    version = "1.0"

    def execute(self):
        return sorted(FOUND)
