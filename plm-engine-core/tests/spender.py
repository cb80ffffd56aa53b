"""A process that spends: run by `test_budget_races.py`, which counts and kills.

    python spender.py race    DSN TENANT DEMAND FACE    admits DEMAND calls of one run and prints what was granted
    python spender.py crowd   DSN TENANT NUMBER FACE    forks NUMBER processes that race for four times what there is,
                                                        every second one through the other face; a line of each
    python spender.py forever DSN TENANT SEED   FACE    admits, begins and settles calls of many runs until it is killed
    python spender.py recover DSN TENANT 0      FACE    drives every run that nobody holds any more

FACE is `async` or `sync`: through which face of the control plane.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from conftest import REGISTRY, TableDelivery, policy
from plm_engine_core.agent_runtime import Driver, Finish, History, Selector
from plm_engine_core.control_plane import ControlPlane, Granted, Outcome, Principal, Proposal, RunRequest
from plm_engine_core.control_plane.errors import FencingLost, StorageUnavailable
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.runs import Lease
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.sync import SyncControlPlane
from plm_engine_core.control_plane.vocabulary import OutcomeStatus, RunState

CALLS = 200
"""What the tenant may spend."""

WHO = Principal(user_id=new_id(), actor_kind="human", scopes=frozenset({"plm.runs.create", "things.read"}))
LIMITS = {"run": {"EUR": "1000", "calls": "1000"}, "tenant": {"EUR": "1000", "calls": str(CALLS)}}


@asynccontextmanager
async def opened(dsn: str, limits: dict[str, Any] = LIMITS) -> AsyncIterator[ControlPlane]:
    async with open_pool(dsn, max_size=2, timeout=2) as pool:
        rate = {"per_second": 1e6, "burst": 1e6}
        under = policy(budgets=limits, rate_limit=rate, grant_seconds=60)
        yield ControlPlane(policy=under, registry=REGISTRY, storage=PostgresStorage(pool, TableDelivery()))


async def lease_of_new_run(plane: ControlPlane, tenant: UUID, seconds: float, *, owner: str = "spender") -> Lease:
    request = RunRequest(
        tenant_id=tenant,
        run_id=new_id(),
        agent={"name": "spender", "plan": {}},
        input={},
        trace_id=secrets.token_hex(16),
    )
    run, _ = await plane.create_run(request, principal=WHO)
    lease = await plane.storage.runs.take(tenant, run.id, owner=owner, seconds=seconds)
    assert lease is not None
    return lease


def proposal(lease: Lease, step: int) -> Proposal:
    return Proposal(
        tenant_id=lease.run.tenant_id,
        run_id=lease.run.id,
        fencing_token=lease.fencing_token,
        step_index=step,
        attempt=1,
        step_id=f"s{step}",
        capability="thing.read",
        resource="thing/1",
        arguments={},
        principal=WHO,
    )


async def race(plane: ControlPlane, tenant: UUID, demand: int) -> None:
    lease = await lease_of_new_run(plane, tenant, 600)
    answers = [await plane.admit(proposal(lease, step)) for step in range(demand)]
    reasons = {getattr(each, "reason", None) for each in answers} - {None}
    granted = sum(isinstance(each, Granted) for each in answers)
    sys.stdout.write(" ".join([str(granted), *sorted(reasons)]) + "\n")


async def forever(plane: ControlPlane, tenant: UUID, seed: int) -> None:
    dice = random.Random(seed)  # a test that can be repeated
    while True:
        try:
            await spend(plane, tenant, dice)
        except (StorageUnavailable, FencingLost):
            await asyncio.sleep(0.05)


async def spend(plane: ControlPlane, tenant: UUID, dice: random.Random) -> None:
    lease = await lease_of_new_run(plane, tenant, 1)
    answer = await plane.admit(proposal(lease, 0), begin=dice.random() < 0.5)
    if not isinstance(answer, Granted) or dice.random() < 0.1:
        return
    held: dict[str, Any] = {"fencing_token": lease.fencing_token, "actor": "spender"}
    status = OutcomeStatus.NOT_STARTED
    if answer.begun or dice.random() < 0.7:
        begun = answer.begun or (await plane.begin(answer.grant, **held)).accepted
        if not begun or dice.random() < 0.1:
            return
        status = dice.choice([OutcomeStatus.SUCCEEDED, OutcomeStatus.FAILED])
    capability = plane.capability("thing.read")
    outcome = Outcome(status=status)
    await plane.settle(answer.grant, outcome, capability=capability, trace_id=lease.run.trace_id, **held)


class NothingToDo:
    """The agent of a run whose only step is over."""

    def next(self, history: History) -> Finish:  # an agent's interface
        return Finish(succeeded=True)


async def recover(plane: ControlPlane, tenant: UUID, number: int) -> None:  # a command's arguments
    driver = Driver(control_plane=plane, agents=lambda _: NothingToDo(), selector=Selector([]), owner="recovery")
    for state in (RunState.RUNNING, RunState.QUEUED):
        while runs := await plane.storage.runs.list(tenant, limit=200, before=None, state=state):
            for run in runs:
                await driver.drive(tenant, run.id)


def crowd(dsn: str, tenant: str, number: int) -> None:
    """Racers that import everything once, and so start together; this process has no thread and no loop yet."""
    children = []
    for each in range(number):
        child = os.fork()
        if child == 0:
            main("race", dsn, tenant, str(4 * CALLS // number), ("async", "sync")[each % 2])
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


def main(command: str, dsn: str, tenant: str, number: str, face: str) -> None:
    work: Callable[[ControlPlane, UUID, int], Awaitable[None]] = {
        "race": race,
        "forever": forever,
        "recover": recover,
    }[command]

    async def on(plane: ControlPlane) -> None:
        await work(plane, UUID(tenant), int(number))

    if face == "sync":
        with SyncControlPlane(opened(dsn)) as plane:
            plane.call(on)
    else:

        async def alone() -> None:
            async with opened(dsn) as plane:
                await on(plane)

        asyncio.run(alone())


if __name__ == "__main__":
    if sys.argv[1] == "crowd":
        crowd(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(*sys.argv[1:])
