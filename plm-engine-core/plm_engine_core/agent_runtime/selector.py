"""Chooses who carries a capability out."""

from __future__ import annotations

from collections.abc import Sequence

from plm_engine_core.agent_runtime.executor import Executor
from plm_engine_core.control_plane.registry import CapabilityDescriptor


class Selector:
    """Picks the first executor of this node that offers a capability."""

    def __init__(self, executors: Sequence[Executor]) -> None:
        self._executors = tuple(executors)

    def select(self, capability: CapabilityDescriptor) -> Executor | None:
        """An executor, or None when no plugin of this node offers the capability."""
        return next((executor for executor in self._executors if executor.offers(capability)), None)
