"""Identities and where the running task finds them; the platform's own identity."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta

import plm_engine_core.control_plane.identity as package
import pytest
from plm_engine_core.control_plane.identity import (
    ActorKind,
    AuditEvent,
    AuditRecord,
    AuditUnavailable,
    IdentityContext,
    InMemoryAuditSink,
    get_current_identity,
    identity_bound,
    make_test_identity,
    require_identity,
    with_system_identity,
)
from pydantic import ValidationError

TENANT = uuid.UUID(int=2)


class BrokenSink:
    async def write(self, record: AuditRecord) -> None:
        raise AuditUnavailable("the disk is full", tenant_id=record.tenant_id)


def test_an_identity_cannot_be_changed_extended_or_dated_without_a_zone() -> None:
    identity = make_test_identity(tenant_id=TENANT)
    with pytest.raises(ValidationError):
        identity.tenant_id = uuid.uuid4()  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(identity).model_validate(identity.model_dump() | {"trace_id": "0"})
    with pytest.raises(ValidationError, match="timezone"):
        type(identity).model_validate(identity.model_dump() | {"expires_at": identity.expires_at.replace(tzinfo=None)})
    assert identity.expires_at - identity.issued_at == timedelta(hours=1)


def test_requiring_an_identity_outside_any_is_a_lookup_error() -> None:
    assert get_current_identity() is None
    with pytest.raises(LookupError, match="IdentityMiddleware"):
        require_identity()


def test_bindings_nest_and_are_put_back_even_after_an_error() -> None:
    outer, inner = make_test_identity(), make_test_identity()
    with identity_bound(outer):
        with identity_bound(inner):
            assert require_identity() is inner
        assert require_identity() is outer
        with pytest.raises(ZeroDivisionError), identity_bound(inner):
            raise ZeroDivisionError
        assert require_identity() is outer
    assert get_current_identity() is None


async def test_tasks_side_by_side_see_their_own_identity() -> None:
    async def seen(barrier: asyncio.Barrier) -> bool:
        identity = make_test_identity()
        with identity_bound(identity):
            await barrier.wait()
            return require_identity() is identity

    barrier = asyncio.Barrier(3)
    assert await asyncio.gather(*(seen(barrier) for _ in range(3))) == [True] * 3


async def test_what_outlives_its_block_acts_for_nobody() -> None:
    left, outer = asyncio.Event(), make_test_identity()

    async def later() -> IdentityContext | None:
        await left.wait()
        return get_current_identity() or await asyncio.to_thread(get_current_identity)

    with identity_bound(outer):
        async with with_system_identity(tenant_id=TENANT, audit=InMemoryAuditSink()) as identity:
            assert await asyncio.create_task(asyncio.to_thread(get_current_identity)) is identity
            within = asyncio.create_task(later())
        beside = asyncio.create_task(later())
        left.set()
        assert (await within, await beside) == (None, outer)


async def test_the_system_identity_is_recorded_before_it_is_bound_and_ends_with_its_block() -> None:
    sink = InMemoryAuditSink()
    async with with_system_identity(tenant_id=TENANT, audit=sink, scopes=["b", "a"]) as identity:
        assert require_identity() is identity
        assert identity.actor_kind is ActorKind.SYSTEM
        assert identity.expires_at - identity.issued_at == timedelta(minutes=5)
    assert get_current_identity() is None
    (record,) = sink.records
    assert (record.event_type, record.tenant_id, record.user_id) == (
        AuditEvent.IDENTITY_BIND,
        TENANT,
        identity.user_id,
    )
    assert record.payload == {"provider": "internal", "scopes": ["a", "b"], "session_id": None}


async def test_without_its_record_the_system_identity_does_not_exist() -> None:
    with pytest.raises(AuditUnavailable):
        async with with_system_identity(tenant_id=TENANT, audit=BrokenSink()):
            pytest.fail("the block must not run")


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(seconds=-1), timedelta(days=1, seconds=1)])
async def test_a_system_identity_lives_at_most_a_day(lifetime: timedelta) -> None:
    with pytest.raises(ValueError, match="at most a day"):
        async with with_system_identity(tenant_id=TENANT, audit=InMemoryAuditSink(), lifetime=lifetime):
            pytest.fail("the block must not run")


def test_the_package_exports_what_it_lists_and_nothing_else() -> None:
    listed = package.__all__
    public = {
        name for name, value in vars(package).items() if not name.startswith("_") and hasattr(value, "__module__")
    }
    assert listed == sorted(listed)
    assert set(listed) == public - {"annotations"}
