"""A process that is killed in the middle of a call: run by `test_orphans.py`.

    python orphan.py FACE MOMENT DSN TENANT

FACE is `host` (the control plane driven by hand) or `governed`. It says "now" once it stands at MOMENT, `admitted` or
`begun`, and stays there. Leases are of two seconds, renewed by the governor.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from conftest import REGISTRY, TableDelivery, policy
from plm_engine_core import Governor, SyncControlPlane, governed
from plm_engine_core.agent_runtime.governed_calls import GovernedCalls
from plm_engine_core.control_plane import ControlPlane, Principal
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.storage.postgres.admission import PostgresAdmission

WHO = Principal(user_id=new_id(), actor_kind="agent", scopes=frozenset({"plm.runs.create", "things.read"}))
LEASE_SECONDS = 2.0


def stay() -> None:
    """Say so, and stay until the kill."""
    sys.stdout.write("now\n")
    sys.stdout.flush()
    threading.Event().wait()


class Staying(PostgresAdmission):
    """Admission after which nothing begins, as releases had it that did not begin with it."""

    async def admit(self, command: Any, **keywords: Any) -> Any:
        """Stay after it."""
        await super().admit(command._replace(begin=False), **keywords)
        stay()


@asynccontextmanager
async def opened(dsn: str, moment: str) -> AsyncIterator[ControlPlane]:
    async with open_pool(dsn, max_size=2) as pool:
        storage = PostgresStorage(pool, TableDelivery())
        if moment == "admitted":
            storage.admission.__class__ = Staying
        yield ControlPlane(policy=policy(), registry=REGISTRY, storage=storage)


async def host(dsn: str, moment: str, tenant: UUID) -> None:
    async with opened(dsn, moment) as plane:
        governor = Governor(SyncControlPlane(plane), tenant_id=tenant, principal=WHO, lease_seconds=LEASE_SECONDS)
        opening = await GovernedCalls(governor).open_call(plane, "thing.read", "thing/1", {})
        await opening.keeping.aclose()  # nobody renews the lease
        stay()


def main(face: str, moment: str, dsn: str, tenant: str) -> None:
    if face == "host":
        asyncio.run(host(dsn, moment, UUID(tenant)))
        return
    plane = SyncControlPlane(opened(dsn, moment))
    with Governor(plane, tenant_id=UUID(tenant), principal=WHO, lease_seconds=LEASE_SECONDS) as governor:
        governed("thing.read", by=governor)(stay)()


if __name__ == "__main__":
    main(*sys.argv[1:])
