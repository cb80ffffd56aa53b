"""What a host may ask of a loaded plugin besides calls: ``{"type": "ask", "id": ..., "verb": ...}`` and arguments.

The answer is that of a call: progress, logs, and then one result or error. A plugin cannot ask anything of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from plugin_substrate.errors import PluginInputError, ProtocolError
from plugin_substrate.interface import PluginInterface
from plugin_substrate.worker.usage import process_stats

#: These change the plugin, so they run where ``initialize`` ran and calls run; the host lets no call run beside them.
CHANGING = frozenset({"reconfigure"})


def answer(plugin: PluginInterface, verb: str, arguments: Mapping[str, Any]) -> Any:
    """Carry out one verb; an unknown one is a `ProtocolError`, one that this plugin has not a `PluginInputError`."""
    handler = _VERBS.get(verb)
    if handler is None:
        raise ProtocolError(f"unknown verb {verb!r:.80}")
    return handler(plugin, **arguments)


def plain(value: Any) -> Any:
    """Return a value with its dataclasses as objects, in any nesting of lists, tuples and dicts."""
    if hasattr(type(value), "__dataclass_fields__"):
        from dataclasses import asdict  # only where there is one: see `records`

        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _monitor(method: str) -> Callable[[PluginInterface], Any]:
    def ask(plugin: PluginInterface) -> Any:
        function = getattr(plugin, method, None)
        if not callable(function):
            raise PluginInputError(f"{plugin.name} is not a system monitor: it has no {method}()")
        return plain(function())

    return ask


def _schema(plugin: PluginInterface) -> dict[str, Any]:
    if type(plugin).get_config_schema is PluginInterface.get_config_schema and plugin.config_class is None:
        raise PluginInputError(f"the code of {plugin.name} leaves its configuration's schema to its metadata")
    return plugin.get_config_schema()


_VERBS: Mapping[str, Callable[..., Any]] = {
    "reconfigure": lambda plugin, old, new: plugin.reconfigure(old, new),
    "prefetch": lambda plugin: plugin.prefetch(),
    "on_disable": lambda plugin: plugin.on_disable(),
    "on_enable": lambda plugin: plugin.on_enable(),
    "config_schema": lambda plugin: plain(_schema(plugin) or {}),
    "config_options": lambda plugin: plain(plugin.get_config_options() or {}),
    "current_config": lambda plugin: plain(plugin.get_current_config() or {}),
    "stats": lambda _: process_stats(),
    "get_system_status": _monitor("get_system_status"),
    "list_processes": _monitor("list_processes"),
}
