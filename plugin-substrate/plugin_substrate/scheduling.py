"""Who decides whether a call may take what its plugin needs. A scheduler reads figures; it measures nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from plugin_substrate.errors import ResourceShortfall
from plugin_substrate.metadata import PluginMeta

GPU_MEMORY = "gpu_memory_mb"
SYSTEM_MEMORY = "memory_mb"


@dataclass(frozen=True, kw_only=True)
class SystemFigures:
    """What is free for one call, in MB of 2**20 bytes; None when nobody could say, and ``missing`` then says why.

    What calls that run already were granted and have not yet taken is not free. What the worker that would serve the
    call holds already is.
    """

    gpu_free_memory_mb: float | None = None
    memory_available_mb: float | None = None
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A scheduler's answer. One that is refused says why; ``shortfall`` has the numbers when figures were there."""

    granted: bool
    reason: str = ""
    shortfall: ResourceShortfall | None = None

    def __bool__(self) -> bool:
        return self.granted


GRANTED = Allocation(granted=True)


class ResourceScheduler(ABC):
    """Decides on figures. Derive from it to decide otherwise; methods run on the event loop and must be quick.

    Where ``reads_figures`` is false, none are gathered. A refusal makes the host evict idle workers and ask again;
    one that stands after that waits for up to ``timeout`` seconds, and then is a `PluginResourceError`.
    """

    reads_figures: ClassVar[bool] = True
    timeout: float = 0.0
    poll_interval: float = 2.0

    @abstractmethod
    def allocate(self, plugin_meta: PluginMeta, figures: SystemFigures) -> Allocation:
        """Say whether a call of a plugin may start now."""

    def on_execution_start(self, plugin_name: str) -> None:  # noqa: B027 - not everyone needs to know
        """Hear that a call was sent."""

    def on_execution_finish(self, plugin_name: str) -> None:  # noqa: B027 - not everyone needs to know
        """Hear that it has ended, however it did."""


class PermissiveScheduler(ResourceScheduler):
    """Always says yes."""

    reads_figures = False

    def allocate(self, plugin_meta: PluginMeta, figures: SystemFigures) -> Allocation:  # noqa: ARG002 - the port has them
        """Say yes."""
        return GRANTED


class SafetyScheduler(ResourceScheduler):
    """Says yes when what the manifest asks for is free.

    That is ``min_system_ram_mb``, and with ``requires_gpu`` ``min_gpu_vram_mb``. Without a figure that it needs it says
    no, and which one it was.
    """

    def allocate(self, plugin_meta: PluginMeta, figures: SystemFigures) -> Allocation:
        """Compare what is asked for with what is free."""
        needs = plugin_meta.resources
        wanted = [(SYSTEM_MEMORY, needs.min_system_ram_mb, figures.memory_available_mb)]
        if needs.requires_gpu:
            wanted.insert(0, (GPU_MEMORY, needs.min_gpu_vram_mb, figures.gpu_free_memory_mb))
        for resource, needed, available in wanted:
            if needed <= 0:
                continue
            if available is None:
                return Allocation(granted=False, reason=_unknown(plugin_meta, resource, needed, figures.missing))
            if available < needed:
                shortfall = ResourceShortfall(resource, needed, available)
                reason = f"{plugin_meta.name!r} needs {needed:g} of {resource}, and {available:g} are free"
                return Allocation(granted=False, reason=reason, shortfall=shortfall)
        return GRANTED


class QueueScheduler(SafetyScheduler):
    """Like `SafetyScheduler`, but a call waits for up to ``timeout`` seconds, first come, first served.

    It looks again whenever something ends in this host. What other programs free makes no event, so it also looks every
    ``poll_interval`` seconds.
    """

    def __init__(self, timeout: float = 300.0, poll_interval: float = 2.0) -> None:
        if timeout < 0 or poll_interval <= 0:
            raise ValueError(f"timeout {timeout} must not be negative, and poll_interval {poll_interval} be over 0")
        self.timeout = timeout
        self.poll_interval = poll_interval
        self._active: Counter[str] = Counter()

    def on_execution_start(self, plugin_name: str) -> None:
        """Count a call."""
        self._active[plugin_name] += 1

    def on_execution_finish(self, plugin_name: str) -> None:
        """Count it no longer."""
        self._active[plugin_name] -= 1
        if self._active[plugin_name] <= 0:
            del self._active[plugin_name]

    def get_active_plugins(self) -> set[str]:
        """Return the plugins that have calls running."""
        return set(self._active)


def _unknown(meta: PluginMeta, resource: str, needed: float, missing: str) -> str:
    why = missing or "no monitor plugin tells it; see register_system_monitor"
    return f"{meta.name!r} needs {needed:g} of {resource}, and nobody knows how much is free: {why}"
