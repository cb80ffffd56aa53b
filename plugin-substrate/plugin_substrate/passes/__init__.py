"""The one-shot file pass: plugins that edit the files of a folder, each confined to a copy of it."""

from plugin_substrate.errors import PluginError
from plugin_substrate.file_plugin import FileChange, FilePlugin, PluginContext, PluginInputRequired
from plugin_substrate.passes.carry_over import CarryOverError
from plugin_substrate.passes.host import PluginHost
from plugin_substrate.passes.records import (
    InputDeclined,
    InputRequiredPayload,
    PassLimits,
    PluginPassResult,
    PluginRecord,
    PluginRegistryProtocol,
    PluginStatus,
    ProtectedPaths,
)
from plugin_substrate.passes.recovery import recover
from plugin_substrate.passes.registry import PluginRegistry, RegistryReport

__all__ = [
    "CarryOverError",
    "FileChange",
    "FilePlugin",
    "InputDeclined",
    "InputRequiredPayload",
    "PassLimits",
    "PluginContext",
    "PluginError",
    "PluginHost",
    "PluginInputRequired",
    "PluginPassResult",
    "PluginRecord",
    "PluginRegistry",
    "PluginRegistryProtocol",
    "PluginStatus",
    "ProtectedPaths",
    "RegistryReport",
    "recover",
]
