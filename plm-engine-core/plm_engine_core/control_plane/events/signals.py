"""Signals: news for whoever watches a run. They wake readers up and are never the record of anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol
from uuid import UUID


class Signals(Protocol):
    """Publishes news of a run; losing one loses nothing, because readers then look at the stream itself."""

    async def changed(self, tenant_id: UUID, run_id: UUID) -> None:
        """The run's stream has new events."""
        ...

    async def progress(self, tenant_id: UUID, run_id: UUID, report: Mapping[str, Any]) -> None:
        """A step reports progress: `step`, `step_id`, `fraction` (0 to 1, or -1 when unknown) and `message`."""
        ...


class NoSignals:
    """For who has no watchers."""

    async def changed(self, tenant_id: UUID, run_id: UUID) -> None:
        """Tell nobody."""

    async def progress(self, tenant_id: UUID, run_id: UUID, report: Mapping[str, Any]) -> None:
        """Tell nobody."""
