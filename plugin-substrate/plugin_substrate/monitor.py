"""What a monitor plugin says about the machine and its GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plugin_substrate.errors import PluginError
from plugin_substrate.interface import is_amount
from plugin_substrate.process_tree import memory_available_mb
from plugin_substrate.telemetry import attribute_gpus

_PATIENCE_SECONDS = 5.0

Ask = Callable[[str], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class MonitorReading:
    """One answer of a monitor, or of the kernel alone; ``missing`` says why figures are not there."""

    status: Mapping[str, Any] = field(default_factory=dict)
    processes: Sequence[Any] | None = None
    missing: str = ""

    @property
    def gpu_free_memory_mb(self) -> float | None:
        """Free GPU memory, when the monitor says it as an amount."""
        return self._amount("gpu_free_memory_mb")

    @property
    def memory_available_mb(self) -> float | None:
        """Available memory, of the monitor if it says it, else of the kernel."""
        told = self._amount("memory_available_mb")
        return memory_available_mb() if told is None else told

    def gpu_held_mb(self, pids: Sequence[int]) -> float | None:
        """GPU memory of some processes together; None when the monitor lists no processes."""
        if self.processes is None:
            return None
        held: float = attribute_gpus(pids, self.processes, self.status)["gpu_memory_mb"]
        return held

    def _amount(self, name: str) -> float | None:
        value: Any = self.status.get(name)
        return float(value) if is_amount(value) else None


async def read_monitor(ask: Ask | None) -> MonitorReading:
    """Ask a monitor plugin for status and processes; when it fails or takes over 5 s, figures are missing."""
    if ask is None:
        return MonitorReading(missing="no monitor plugin is registered; see register_system_monitor")
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            status = await ask("get_system_status")
            processes = await ask("list_processes")
    except (PluginError, TimeoutError) as error:
        return MonitorReading(missing=f"the monitor plugin failed: {error or 'no answer'}")
    return MonitorReading(
        status=status if isinstance(status, dict) else {},
        processes=processes if isinstance(processes, list) else None,
        missing="" if isinstance(status, dict) else "the monitor plugin's status is no object",
    )
