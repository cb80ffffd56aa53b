"""Stray artifacts: files that no record names, because whoever stored them ended before the commit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from plm_shared.artifact_store import ArtifactRef, ArtifactStorageBackend, ListedArtifact

from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.storage.ports import Storage
from plm_engine_core.control_plane.sweeping import InTenant

logger = logging.getLogger(__name__)

GRACE_SECONDS: Final = 86_400.0
_PAGE: Final = 500
_MUCH: Final = 60.0  # seconds that two clocks are apart, beyond which somebody has to look


class StrayArtifacts:
    """Removes them, tenant by tenant; safe to run anywhere any number of times.

    A file is stored before the transaction that records it, so a young one may be about to be recorded:
    `grace_seconds` has to be longer than the longest upload and the longest that a process can stand still between
    both. Left alone is also whatever does not bear the id of an artifact, and all that is of a tenant that this
    database does not have, as another database may share the store. A store in a folder tells ages by this machine's
    clock: where that is ahead of the database's, each file counts as so much younger.
    """

    def __init__(
        self, storage: Storage, store: ArtifactStorageBackend, in_tenant: InTenant, *, grace_seconds: float
    ) -> None:
        self._storage = storage
        self._in_tenant = in_tenant
        self._store = store
        self._grace = grace_seconds

    async def sweep(self) -> int:
        """One pass over all tenants; answers how many files were removed. What fails is left to the next pass."""
        removed = 0
        tenants = await self._storage.checkpoints.tenants()
        ahead = (datetime.now(UTC) - await self._storage.runs.now()).total_seconds()
        if ahead > _MUCH:
            logger.warning("the clock of this machine is %.0f s ahead of the database's; set it right", ahead)
        oldest = self._grace + max(0.0, ahead)
        for tenant_id in tenants:
            try:
                async with self._in_tenant(tenant_id):
                    removed += await self._sweep(tenant_id, oldest)
            except ControlPlaneError:
                raise  # without the records nothing can be told
            except Exception:  # whatever the store's client raises
                logger.exception("stray artifacts of tenant %s stay until the next pass", tenant_id)
        return removed

    async def _sweep(self, tenant_id: UUID, oldest: float) -> int:
        removed = 0
        after = None
        while True:
            page = await asyncio.to_thread(self._store.list, str(tenant_id), after=after, limit=_PAGE)
            for stray in await self._strays(tenant_id, page.artifacts, oldest):
                await asyncio.to_thread(self._store.delete, stray)
                logger.warning("removed %s, which no record names", stray.relative_path)
                removed += 1
            if (after := page.after) is None:
                return removed

    async def _strays(self, tenant_id: UUID, listed: Sequence[ListedArtifact], oldest: float) -> Sequence[ArtifactRef]:
        """Those of a page that are old enough and recorded nowhere; the records are looked at after the page."""
        old = {
            identifier: each.ref
            for each in listed
            if each.age_seconds > oldest and (identifier := _identifier(each.ref)) is not None
        }
        unrecorded = await self._storage.runs.unrecorded(tenant_id, list(old)) if old else []
        return [old[identifier] for identifier in unrecorded]


def _identifier(ref: ArtifactRef) -> UUID | None:
    try:
        found = UUID(ref.artifact_id)
    except ValueError:
        return None
    return found if str(found) == ref.artifact_id else None
