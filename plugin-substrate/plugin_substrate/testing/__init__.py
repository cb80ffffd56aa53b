"""The test kit: call a plugin in-process through the real encoding, or run it in a real worker, and see what holds it.

`load_in_process`, `run_in_process` and `stream_in_process` need no process and no pytest. `PluginWorkers` loads plugins
of the test's own environment in real, confined worker processes; as a pytest plugin it is the fixture
``plugin_workers``. `ConfinementProbe` is a plugin that tries what it is told and reports what happened; `attempt` asks
it. `registry_of` is a registry of file plugins that are named one by one.
"""

from __future__ import annotations

from plugin_substrate.testing.attempts import Attempt, attempt, attempt_async
from plugin_substrate.testing.describe import plugin_meta
from plugin_substrate.testing.in_process import (
    InProcessResult,
    load_in_process,
    run_in_process,
    stream_in_process,
)
from plugin_substrate.testing.probes.confinement_probe import ConfinementProbe
from plugin_substrate.testing.registry import registry_of
from plugin_substrate.testing.workers import LeftBehindError, PluginWorker, PluginWorkers

__all__ = [
    "Attempt",
    "ConfinementProbe",
    "InProcessResult",
    "LeftBehindError",
    "PluginWorker",
    "PluginWorkers",
    "attempt",
    "attempt_async",
    "load_in_process",
    "plugin_meta",
    "registry_of",
    "run_in_process",
    "stream_in_process",
]
