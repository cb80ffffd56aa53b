"""Recovery: brings back what nobody drives although somebody should. Safe to run anywhere, any number of times."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from uuid import UUID

from plm_shared.artifact_store import ArtifactStorageBackend

from plm_engine_core.control_plane.admission.abandoned import OPEN, capability_of, grant_of, outcome_of
from plm_engine_core.control_plane.admission.settle import settle
from plm_engine_core.control_plane.errors import FencingLost, InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.expired_grants import ExpiredGrants
from plm_engine_core.control_plane.identity import SystemIdentities
from plm_engine_core.control_plane.record_expiry import KEEP_SECONDS, SHORTEST_SECONDS, RecordExpiry
from plm_engine_core.control_plane.runs.run import Lease, Orphan, Step
from plm_engine_core.control_plane.storage.leasing import RECOVERY
from plm_engine_core.control_plane.storage.ports import Storage
from plm_engine_core.control_plane.stray_artifacts import GRACE_SECONDS, StrayArtifacts
from plm_engine_core.control_plane.sweeping import ExpiredBatch, InTenant, remove_in_batches, sweep_until_cancelled
from plm_engine_core.control_plane.turns import Turns
from plm_engine_core.control_plane.vocabulary import OutcomeStatus, RunKind, RunState, StepState, SystemActor

logger = logging.getLogger(__name__)

_BATCH = 200
_LOOK = 10_000  # rows of which a batch is chosen; only their ids are read
_LEASE_SECONDS = 30.0
_LONGEST = 100 * 365 * 86_400.0
_NEVER_BEGAN = "its holder was lost before the call began"
_MAY_HAVE_HAPPENED = "its holder was lost; it may have had its effect"


class Recovery:
    """The one sweeper of everything that time or a death leaves open.

    It finds runs whose worker is gone, whose job was lost, whose ticket ran out of time or whose halt was lifted, and
    has them driven again; and tenants in which a halt could not end everything at once. It decides nothing itself:
    whoever then takes a lease closes the abandoned grant, and parks what nobody can know. An enqueued run that nobody
    took for `patience_seconds` counts as lost on its way and is enqueued once more.

    Nobody is told to drive a run of kind `external`. Where its holder let the lease run out, the sweeper takes the run
    itself: a call that did not begin gives back what it had reserved, one that did is parked as `outcome_unknown`, and
    otherwise the run is queued for whoever made it. Queued and left alone for `forsaken_seconds`, it fails as
    `abandoned`.

    A grant that expired before its call began gives back what it holds, also while somebody holds its run: no renewal
    of a lease makes a grant last longer. See `ExpiredGrants`.

    Times of a run that the database's clock wrote while it was ahead count from when they are found, so that nobody
    waits until then. Whoever holds such a run keeps it by renewing its lease.

    Where more is due than one pass does, each tenant has its turn among the ten thousand runs that have waited longest,
    and what failed before comes last.

    With an artifact store it also removes, once in `artifacts_every_seconds`, what stands there for
    `artifact_grace_seconds` without a record; see `StrayArtifacts` for how long that has to be.

    Once in `records_every_seconds` it removes the idempotency records of runs that ended `idempotency_seconds` ago; see
    `RecordExpiry` for what becomes of their commands then. With them go the records of locks whose call is over, which
    hold nobody up.

    In each tenant it acts as `system:recovery` of `identities`, whose record is in the audit log before anything is
    done there; without any, it acts so and nothing is recorded. To find what is due over all tenants takes no identity:
    that answers ids only.

    Raises:
        InvalidRequest: a number of seconds is none from 0 to a hundred years; nothing would ever be found by it. Or
            `idempotency_seconds` is less than a day.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        every_seconds: float = 10.0,
        patience_seconds: float = 30.0,
        forsaken_seconds: float = 7 * 86_400.0,
        artifacts: ArtifactStorageBackend | None = None,
        artifacts_every_seconds: float = 3600.0,
        artifact_grace_seconds: float = GRACE_SECONDS,
        idempotency_seconds: float = KEEP_SECONDS,
        records_every_seconds: float = 3600.0,
        identities: SystemIdentities | None = None,
    ) -> None:
        _check_seconds(every_seconds, "every_seconds")
        _check_seconds(patience_seconds, "patience_seconds")
        _check_seconds(forsaken_seconds, "forsaken_seconds")
        _check_seconds(idempotency_seconds, "idempotency_seconds", least=SHORTEST_SECONDS)
        _check_seconds(records_every_seconds, "records_every_seconds")
        self._storage = storage
        self._every_seconds = every_seconds
        self._patience = patience_seconds
        acting = (identities or SystemIdentities(None)).acting
        self._in_tenant = partial(acting, SystemActor.RECOVERY)
        self._orphans = _Orphans(storage, self._in_tenant, forsaken_seconds=forsaken_seconds)
        self._expired = ExpiredGrants(storage, self._in_tenant)
        self._turns = Turns(_BATCH)
        self._ahead = Turns(_BATCH)
        self._strays = (
            None
            if artifacts is None
            else StrayArtifacts(storage, artifacts, self._in_tenant, grace_seconds=artifact_grace_seconds)
        )
        self._artifacts_every_seconds = artifacts_every_seconds
        self._records = RecordExpiry(storage, self._in_tenant, keep_seconds=idempotency_seconds)
        self._records_every_seconds = records_every_seconds

    async def sweep(self) -> int:
        """One pass; answers how many runs were enqueued. What fails for one row or tenant is left to the next pass."""
        for part in (self._end_halted, self._set_back, self._orphans.close, self._expired.close):
            try:
                await part()
            except StorageUnavailable:
                raise
            except Exception:  # a function of another release, or one that may not be called
                logger.exception("a part of a recovery pass failed; the others go on")
        revived = 0
        runs = self._storage.runs
        due = await runs.abandoned(_LOOK, patience_seconds=self._patience)
        for tenant_id, run_id in self._turns.choose(due):
            try:
                async with self._in_tenant(tenant_id):
                    revived += await runs.revive(tenant_id, run_id, patience_seconds=self._patience)
            except Exception:
                self._turns.failed(run_id)
                logger.warning("a run could not be brought back yet", extra={"run_id": str(run_id)}, exc_info=True)
        return revived

    async def _end_halted(self) -> None:
        """Finish what the trigger of a halt could not."""
        halts = self._storage.halts
        for tenant_id in await halts.unfinished(_BATCH):
            try:
                async with self._in_tenant(tenant_id):
                    await halts.end_halted(tenant_id)
            except Exception:
                logger.warning("a halt is not finished yet", extra={"tenant_id": str(tenant_id)}, exc_info=True)

    async def _set_back(self) -> None:
        """Let times that lie ahead count from now on."""
        runs = self._storage.runs
        found = await runs.ahead(_LOOK, patience_seconds=self._patience)
        for tenant_id, run_id in self._ahead.choose(found):
            try:
                async with self._in_tenant(tenant_id):
                    was_ahead = await runs.set_back(tenant_id, run_id, patience_seconds=self._patience)
                if was_ahead:
                    logger.warning(
                        "a run has times that lie ahead: the database's clock was set back, and they count from now on",
                        extra={"run_id": str(run_id)},
                    )
            except Exception:
                self._ahead.failed(run_id)
                logger.warning("a run's times lie ahead still", extra={"run_id": str(run_id)}, exc_info=True)

    async def sweep_artifacts(self) -> int:
        """One pass over the artifact store, if there is one; answers how many stray files were removed."""
        return await self._strays.sweep() if self._strays is not None else 0

    async def sweep_records(self) -> int:
        """One pass over idempotency records and records of locks; answers how many were removed."""
        removed = await self._records.sweep()
        return removed + await remove_in_batches(
            self._storage, self._locks_over, self._in_tenant, name="records of locks", logger=logger
        )

    async def _locks_over(self, tenant_id: UUID) -> ExpiredBatch:
        removed = await self._storage.locks.sweep(tenant_id, limit=_BATCH)
        return ExpiredBatch(records=removed, more=removed == _BATCH)

    async def run(self) -> None:
        """Sweep until cancelled; a failed pass is logged and the next one tries again.

        Neither a store that is slow to answer nor much that has expired holds up what runs wait for.
        """
        sweep = partial(sweep_until_cancelled, name="a recovery pass", logger=logger)
        async with asyncio.TaskGroup() as parts:
            parts.create_task(sweep(self.sweep, every_seconds=self._every_seconds))
            parts.create_task(sweep(self.sweep_records, every_seconds=self._records_every_seconds))
            if self._strays is not None:
                parts.create_task(sweep(self._strays.sweep, every_seconds=self._artifacts_every_seconds))


class _Orphans:
    """Runs of kind `external` that their holder left, with whatever is open in them."""

    def __init__(self, storage: Storage, in_tenant: InTenant, *, forsaken_seconds: float) -> None:
        self._storage = storage
        self._in_tenant = in_tenant
        self._forsaken = forsaken_seconds
        self._turns = Turns(_BATCH)

    async def close(self) -> None:
        """Close what is left; what another sweeper or the holder itself does meanwhile is its own."""
        found = await self._storage.runs.orphaned(_LOOK, forsaken_seconds=self._forsaken)
        orphans = {orphan.run_id: orphan for orphan in found}
        for _, run_id in self._turns.choose((orphan.tenant_id, orphan.run_id) for orphan in found):
            orphan = orphans[run_id]
            try:
                async with self._in_tenant(orphan.tenant_id):
                    await self._close(orphan)
            except FencingLost:
                continue
            except Exception:  # a record of another release, or a damaged one
                self._turns.failed(run_id)
                logger.warning("a run could not be closed yet", extra={"run_id": str(orphan.run_id)}, exc_info=True)

    async def _close(self, orphan: Orphan) -> None:
        runs = self._storage.runs
        lease = await runs.take(
            orphan.tenant_id, orphan.run_id, owner="recovery", seconds=_LEASE_SECONDS, kind=RunKind.EXTERNAL
        )
        if lease is None:  # taken by somebody else, or parked under a halt
            return
        left = [step for step in await runs.steps(orphan.tenant_id, orphan.run_id) if step.state in OPEN]
        # An unknown outcome parks the run, after which nothing else of it can be settled.
        for step in sorted(left, key=lambda each: each.state is StepState.RUNNING):
            status, message = _ended(step)
            await settle(
                grant_of(lease.run, step),
                outcome_of(step, status, message),
                fencing_token=lease.fencing_token,
                capability=capability_of(step),
                trace_id=lease.run.trace_id,
                actor=RECOVERY,
                storage=self._storage.admission,
            )
            if status is OutcomeStatus.OUTCOME_UNKNOWN:
                return
        untouched = lease.fencing_token == orphan.fencing_token + 1
        await self._give_back(lease, forsaken=orphan.forsaken and untouched and not left)

    async def _give_back(self, lease: Lease, *, forsaken: bool) -> None:
        state, reason, message = RunState.QUEUED, None, None
        if lease.run.cancel_requested:
            state, reason, message = RunState.CANCELLED, "cancelled", "cancelled on request"
        elif forsaken:
            words = f"nobody took it up for {self._forsaken:g} s"
            state, reason, message = RunState.FAILED, "abandoned", words
        await self._storage.runs.finish(
            lease.run.tenant_id,
            lease.run.id,
            fencing_token=lease.fencing_token,
            state=state,
            actor=RECOVERY,
            reason=reason,
            message=message,
        )


def _check_seconds(seconds: float, field: str, *, least: float = 0) -> None:
    if not (type(seconds) in (int, float) and least <= seconds <= _LONGEST):
        problem = f"'{field}' must be from {least:g} to {_LONGEST:g} seconds, not {seconds!r:.80}"
        raise InvalidRequest(problem, field=field)


def _ended(step: Step) -> tuple[OutcomeStatus, str]:
    if step.state is StepState.GRANTED:
        return OutcomeStatus.NOT_STARTED, _NEVER_BEGAN
    return OutcomeStatus.OUTCOME_UNKNOWN, _MAY_HAVE_HAPPENED
