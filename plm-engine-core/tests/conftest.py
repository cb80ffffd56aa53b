"""Fixtures over a real database: a control plane for one tenant, and proposals to make to it."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from plm_engine_core.control_plane import ControlPlane, Principal, Proposal, RunRequest
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry, CostBound
from plm_engine_core.control_plane.runs import Lease, Run
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import BudgetUnit, CapabilityMode
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing.databases import create_tenants

ALL_SCOPES = frozenset(
    {"plm.runs.create", "plm.hitl.resolve", "plm.halt", "plm.halt.system", "things.read", "things.write"}
)


class RecordingDelivery:
    """Remembers what was enqueued in committed transactions by writing nothing outside of them."""

    def __init__(self) -> None:
        self.enqueued: list[tuple[UUID, UUID]] = []

    async def enqueue(self, connection: Any, tenant_id: UUID, run_id: UUID) -> None:
        self.enqueued.append((tenant_id, run_id))


def policy(**changes: Any) -> PolicySnapshot:
    base: dict[str, Any] = {
        "version": "test",
        "tier_by_mode": {"read": "auto_approve", "plan-write": "auto_approve", "execute-write": "always_approve"},
        "risk_by_mode": {"read": "low", "plan-write": "low", "execute-write": "high"},
        "rate_limit": {"per_second": 1000, "burst": 1000},
        "budgets": {"run": {"EUR": "5", "calls": "50"}, "tenant": {"EUR": "100", "calls": "1000"}},
    }
    return PolicySnapshot.model_validate({**base, **changes})


REGISTRY = CapabilityRegistry(
    [
        CapabilityDescriptor(
            id="thing.read",
            description="Look at a thing",
            mode=CapabilityMode.READ,
            plugin="things",
            idempotent=True,
            required_scopes=frozenset({"things.read"}),
            cost=CostBound(max_eur=Decimal("0.50"), eur_per_unit={"thing": Decimal("0.01")}),
        ),
        CapabilityDescriptor(
            id="thing.write",
            description="Change a thing",
            mode=CapabilityMode.EXECUTE_WRITE,
            certified=True,
            plugin="things",
            idempotent=True,
            required_scopes=frozenset({"things.write"}),
            security_relevant=("name",),
            cost=CostBound(max_eur=Decimal("0.10")),
        ),
        CapabilityDescriptor(
            id="thing.fire",
            description="Change a thing in a way that cannot be repeated",
            mode=CapabilityMode.READ,
            plugin="things",
            cost=CostBound(max_eur=Decimal("0.20")),
        ),
    ]
)


@dataclass(kw_only=True)
class Bench:
    """One tenant on one database, with shorthands for what tests do again and again."""

    database: DatabaseUrls
    tenant: UUID
    control_plane: ControlPlane
    delivery: RecordingDelivery
    requester: Principal
    approver: Principal
    extra: dict[str, Any] = field(default_factory=dict)

    async def run(self, **changes: Any) -> Run:
        request = {
            "tenant_id": self.tenant,
            "run_id": new_id(),
            "agent": {"name": "test", "plan": {}},
            "input": {},
            "trace_id": secrets.token_hex(16),
        }
        run, _ = await self.control_plane.create_run(
            RunRequest(**{**request, **changes}), principal=changes.pop("principal", self.requester)
        )
        return run

    async def lease(self, run: Run | None = None, *, seconds: float = 60.0, owner: str = "worker") -> Lease:
        run = run or await self.run()
        lease = await self.control_plane.storage.runs.take(self.tenant, run.id, owner=owner, seconds=seconds)
        assert lease is not None
        return lease

    def proposal(self, lease: Lease, **changes: Any) -> Proposal:
        values = {
            "tenant_id": self.tenant,
            "run_id": lease.run.id,
            "fencing_token": lease.fencing_token,
            "step_index": 0,
            "attempt": 1,
            "step_id": "first",
            "capability": "thing.read",
            "resource": "thing/1",
            "arguments": {"name": "one"},
            "principal": lease.run.principal,
        }
        return Proposal(**{**values, **changes})

    async def budget(self, run: Run, scope: str, unit: BudgetUnit) -> tuple[Decimal, Decimal]:
        for each in await self.control_plane.storage.runs.budgets(self.tenant, run.id):
            if each.scope.value == scope and each.unit is unit:
                return each.spent, each.reserved
        raise LookupError(scope)

    def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement as the database's superuser, who sees every tenant."""
        with psycopg.connect(self.database.admin, autocommit=True) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []


@pytest.fixture
async def bench(engine_database: DatabaseUrls) -> AsyncIterator[Bench]:
    """A control plane over a fresh database."""
    (tenant,) = create_tenants(engine_database, "acme")
    async with open_pool(engine_database.app, max_size=20) as pool:
        delivery = RecordingDelivery()
        yield Bench(
            database=engine_database,
            tenant=tenant,
            delivery=delivery,
            control_plane=ControlPlane(policy=policy(), registry=REGISTRY, storage=PostgresStorage(pool, delivery)),
            requester=Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=ALL_SCOPES),
            approver=Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=ALL_SCOPES),
        )


@pytest.fixture(scope="session")
def package_root() -> Path:
    """The folder of this distribution."""
    return Path(__file__).resolve().parents[1]
