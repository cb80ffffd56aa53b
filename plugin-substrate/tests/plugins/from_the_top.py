"""A plugin that imports what it needs from the package itself, as it may where that is installed."""

from __future__ import annotations

import plugin_substrate
from plugin_substrate import PluginInputError, PluginInterface, interface


class FromTheTop(PluginInterface):
    name = "from-the-top"
    version = "1.0"

    def execute(self, names):
        if not names:
            raise PluginInputError("which names?")
        return [name for name in names if not hasattr(plugin_substrate, name)], interface.__name__
