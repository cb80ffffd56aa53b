"""Who acts with nobody's token: each actor is in a tenant's audit log before it does anything there."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from plm_engine_core.control_plane.events import Signer, open_archive
from plm_engine_core.control_plane.events.archive import Archivist
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.identity import (
    AuditEvent,
    AuditTenantUnknown,
    AuditUnavailable,
    InMemoryAuditSink,
    PostgresAuditSink,
    SystemIdentities,
    get_current_identity,
    system,
)
from plm_engine_core.control_plane.identity.audit import AuditRecord
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.vocabulary import SystemActor
from plm_shared.artifact_store import open_store

TENANT, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)


class Sink(InMemoryAuditSink):
    """Refuses while it is `away`, and lets others go on meanwhile, as a database does."""

    def __init__(self) -> None:
        super().__init__()
        self.away: AuditUnavailable | AuditTenantUnknown | None = None

    async def write(self, record: AuditRecord) -> None:
        await asyncio.sleep(0)
        if self.away is not None:
            raise self.away
        await super().write(record)

    def told(self) -> Sequence[tuple[Any, str]]:
        """In which tenants who was recorded."""
        assert {record.event_type for record in self.records} <= {AuditEvent.IDENTITY_BIND}
        assert {record.actor_kind.value for record in self.records} <= {"system"}
        return [(record.tenant_id, record.payload["actor"]) for record in self.records]


def away(kind: type[AuditUnavailable] | type[AuditTenantUnknown] = AuditUnavailable) -> Any:
    return kind("gone", tenant_id=TENANT)


async def entered(identities: SystemIdentities, actor: SystemActor, tenant: uuid.UUID) -> uuid.UUID:
    async with identities.acting(actor, tenant) as identity:
        assert get_current_identity() is identity
        assert (identity.tenant_id, identity.actor_kind.value) == (tenant, "system")
    assert get_current_identity() is None
    return identity.user_id


async def test_an_actor_is_recorded_once_in_a_tenant_however_often_it_comes_back() -> None:
    sink = Sink()
    identities = SystemIdentities(sink)
    users = await asyncio.gather(*(entered(identities, SystemActor.RECOVERY, TENANT) for _ in range(20)))
    users += [await entered(identities, SystemActor.RECOVERY, TENANT)]
    assert len(set(users)) == 1
    (record,) = sink.records
    assert record.user_id == users[0]
    assert record.payload["provider"] == "internal"
    await entered(identities, SystemActor.RECOVERY, OTHER)
    await entered(identities, SystemActor.ARCHIVE, TENANT)
    assert sink.told() == [(TENANT, "system:recovery"), (OTHER, "system:recovery"), (TENANT, "system:archive")]
    await entered(SystemIdentities(sink), SystemActor.RECOVERY, TENANT)  # of another process
    assert len(sink.records) == 4


async def test_an_identity_that_is_nearly_over_is_replaced_by_another_that_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sink = Sink()
    identities = SystemIdentities(sink)
    first = await entered(identities, SystemActor.RECOVERY, TENANT)
    monkeypatch.setattr(system, "_LEFT", timedelta(days=1))
    assert await entered(identities, SystemActor.RECOVERY, TENANT) != first
    assert len(sink.records) == 2


async def test_without_its_record_nothing_is_done_until_there_is_one() -> None:
    sink = Sink()
    identities = SystemIdentities(sink)
    sink.away = away()
    for _ in range(2):
        with pytest.raises(AuditUnavailable):
            await entered(identities, SystemActor.RECOVERY, TENANT)
    sink.away = None
    await entered(identities, SystemActor.RECOVERY, TENANT)
    assert len(sink.records) == 1


async def test_where_the_audit_is_not_required_the_work_goes_on_and_is_recorded_when_it_can_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = Sink()
    identities = SystemIdentities(sink, required=False)
    sink.away = away()
    await entered(identities, SystemActor.RECOVERY, TENANT)
    assert "identity.bind of system:recovery" in caplog.text
    sink.away = away(AuditTenantUnknown)
    with pytest.raises(AuditTenantUnknown):
        await entered(identities, SystemActor.RECOVERY, TENANT)
    sink.away = None
    await entered(identities, SystemActor.RECOVERY, TENANT)
    assert len(sink.records) == 1


@pytest.mark.every_storage
async def test_the_sweeper_is_recorded_where_it_brings_something_back_and_events_name_it_alike(bench: Any) -> None:
    sink = Sink()
    recovery = Recovery(bench.storage, identities=SystemIdentities(sink))
    assert await recovery.sweep() == 0
    assert sink.told() == []  # nothing was due, so it did nothing in any tenant
    lease = await bench.lease()
    bench.let_lease_expire(lease.run)
    bench.touched(None, 60)
    assert await recovery.sweep() == 1
    assert sink.told() == [(bench.tenant, "system:recovery")]
    bench.touched(lease.run.id, 3600)
    assert await recovery.sweep() == 1
    assert len(sink.records) == 1


@pytest.mark.every_storage
async def test_a_run_stays_where_it_is_while_the_sweeper_cannot_be_recorded(bench: Any) -> None:
    sink = Sink()
    recovery = Recovery(bench.storage, identities=SystemIdentities(sink))
    run = await bench.run()
    bench.touched(run.id, 3600)
    before, sink.away = bench.deliveries(run), away()
    assert await recovery.sweep() == 0
    assert bench.deliveries(run) == before
    sink.away = None
    assert await recovery.sweep() == 1
    assert len(sink.records) == 1


@pytest.mark.every_storage
@pytest.mark.parametrize("part", ["records", "artifacts", "checkpoints", "archive"])
async def test_every_pass_over_all_tenants_is_recorded_in_each(bench: Any, tmp_path: Any, part: str) -> None:
    sink = Sink()
    identities, store = SystemIdentities(sink), bench.storage.checkpoints
    recovery = Recovery(bench.storage, artifacts=open_store(str(tmp_path / "files")), identities=identities)
    passes = {
        "records": recovery.sweep_records,
        "artifacts": recovery.sweep_artifacts,
        "checkpoints": Checkpointer(store, Signer(Ed25519PrivateKey.generate()), identities=identities).sweep,
        "archive": Archivist(bench.storage, open_archive(str(tmp_path / "archive")), identities=identities).sweep,
    }
    actor = {"checkpoints": "system:checkpoints", "archive": "system:archive"}.get(part, "system:recovery")
    await bench.run()
    for _ in range(2):
        await passes[part]()
        assert sorted(sink.told()) == sorted((tenant, actor) for tenant in await store.tenants())


async def test_the_record_is_in_the_tenants_log_for_good(bench: Any, second_pool: Any) -> None:
    identities = SystemIdentities(PostgresAuditSink(second_pool))
    user = await entered(identities, SystemActor.RECOVERY, bench.tenant)
    told = bench.sql("SELECT tenant_id, actor_kind::text, event_type, payload FROM audit_log WHERE user_id = %s", user)
    ((tenant, kind, event, payload),) = told
    assert (tenant, kind, event) == (bench.tenant, "system", "identity.bind")
    assert (payload["actor"], payload["scopes"]) == ("system:recovery", [])
    assert payload["session_id"].endswith(f"/{os.getpid()}")
