"""A process that wants one resource again and again: run by `test_lock_races.py`, which counts and kills.

python locker.py DSN TENANT MANY    until it was granted MANY calls; takes over runs whose holder is gone
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from uuid import UUID

from conftest import REGISTRY, TableDelivery, policy
from plm_engine_core.control_plane import ControlPlane, Denied, Grant, Granted, Outcome
from plm_engine_core.control_plane.admission.abandoned import OPEN, grant_of
from plm_engine_core.control_plane.errors import FencingLost, StorageUnavailable
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.runs import Lease
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import LockScope, OutcomeStatus, Reason, RunState, StepState
from spender import lease_of_new_run, proposal

LEASE_SECONDS = 2.0
SHORT_SECONDS = 0.03
ENDS = [OutcomeStatus.SUCCEEDED, OutcomeStatus.FAILED]


async def call_once(plane: ControlPlane, tenant: UUID) -> bool:
    """Want the resource for a new run; whether it was granted."""
    lease = await lease_of_new_run(plane, tenant, LEASE_SECONDS, owner=str(os.getpid()))
    answer = await plane.admit(proposal(lease, 0), begin=random.random() < 0.5)
    if isinstance(answer, Denied):
        await end(plane, lease)
        if answer.reason is not Reason.RESOURCE_LOCKED:
            raise SystemExit(f"refused for another reason: {answer}")
        await take_over(plane, tenant, UUID(answer.lock["run_id"]))
        return False
    assert isinstance(answer, Granted)
    if not answer.begun:
        await asyncio.sleep(random.uniform(0, 2 * SHORT_SECONDS))  # it may expire meanwhile, and go to somebody else
    begun = answer.begun or (await begin(plane, lease, answer.grant))
    await asyncio.sleep(0.02)  # what the call does
    await settle(plane, lease, answer.grant, random.choice(ENDS) if begun else OutcomeStatus.NOT_STARTED)
    await end(plane, lease)
    return True


async def take_over(plane: ControlPlane, tenant: UUID, run: UUID) -> None:
    """Close what the holder of a run left, if it is gone."""
    lease = await plane.storage.runs.take(tenant, run, owner=str(os.getpid()), seconds=LEASE_SECONDS)
    if lease is None:
        return
    for step in await plane.storage.runs.steps(tenant, run):
        if step.state in OPEN:
            status = OutcomeStatus.NOT_STARTED if step.state is StepState.GRANTED else OutcomeStatus.SUPERSEDED
            await settle(plane, lease, grant_of(lease.run, step), status)
    await end(plane, lease)


async def begin(plane: ControlPlane, lease: Lease, grant: Grant) -> bool:
    return (await plane.begin(grant, fencing_token=lease.fencing_token, actor="test")).accepted


async def settle(plane: ControlPlane, lease: Lease, grant: Grant, status: OutcomeStatus) -> None:
    await plane.settle(
        grant,
        Outcome(status=status),
        capability=plane.capability("thing.read"),
        fencing_token=lease.fencing_token,
        trace_id=lease.run.trace_id,
        actor="test",
    )


async def end(plane: ControlPlane, lease: Lease) -> None:
    await plane.finish(lease.run, fencing_token=lease.fencing_token, state=RunState.FAILED, actor="worker:w")


async def main(dsn: str, tenant: UUID, many: int) -> None:
    wide = {"EUR": "100000", "calls": "100000"}
    quick = {"per_second": 1e6, "burst": 1e6}
    under = policy(budgets={"run": wide, "tenant": wide}, rate_limit=quick, grant_seconds=SHORT_SECONDS)
    registry = CapabilityRegistry(each.model_copy(update={"lock": LockScope.TENANT}) for each in REGISTRY)
    async with open_pool(dsn, max_size=2, timeout=30) as pool:
        plane = ControlPlane(policy=under, registry=registry, storage=PostgresStorage(pool, TableDelivery()))
        granted = 0
        while granted < many:
            try:
                granted += await call_once(plane, tenant)
            except (StorageUnavailable, FencingLost):  # a loaded machine, or somebody thought it was gone
                continue
            await asyncio.sleep(random.uniform(0, 0.05))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], UUID(sys.argv[2]), int(sys.argv[3])))
