"""Signals: news for whoever watches a run. They wake readers up and are never the record of anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
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

    async def interrupt(self, tenant_id: UUID | None, run_id: UUID | None) -> None:
        """A cancel or a halt was committed: who holds the run (every run, where None) should look at its lease now."""
        ...


class Interrupts(Protocol):
    """Wakes the holder of a lease up before its next heartbeat is due."""

    def interrupts(self, tenant_id: UUID, run_id: UUID) -> AbstractContextManager[asyncio.Event]:
        """An event that is set on every interrupt of this run, until the block ends; a lost one costs a heartbeat."""
        ...


class NoSignals:
    """For who has no watchers."""

    async def changed(self, tenant_id: UUID, run_id: UUID) -> None:
        """Tell nobody."""

    async def progress(self, tenant_id: UUID, run_id: UUID, report: Mapping[str, Any]) -> None:
        """Tell nobody."""

    async def interrupt(self, tenant_id: UUID | None, run_id: UUID | None) -> None:
        """Tell nobody."""

    def interrupts(self, tenant_id: UUID, run_id: UUID) -> AbstractContextManager[asyncio.Event]:  # noqa: ARG002
        """An event that nobody sets: the heartbeat alone has to do."""
        return nullcontext(asyncio.Event())
