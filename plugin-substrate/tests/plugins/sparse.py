"""Plugins that import as little as one can, and tell what was imported before them."""

from __future__ import annotations

import sys

from plugin_substrate.interface import PluginInterface

FOUND = frozenset(sys.modules)


class Sparse(PluginInterface):
    name = "sparse"
    version = "1.0"

    def execute(self, log=""):
        if log:
            import logging

            logging.getLogger("sparse").info(log)
        return sorted(FOUND)
