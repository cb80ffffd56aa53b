"""Values that nobody should send: each is refused by its name, by either storage, and leaves the books as they were."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from plm_engine_core.control_plane import Principal
from plm_engine_core.control_plane.errors import InvalidRequest, NotFound
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.registry import Delegation
from plm_engine_core.control_plane.storage.postgres.gateway import translated
from plm_engine_core.control_plane.vocabulary import BudgetScope, HaltScope

pytestmark = pytest.mark.every_storage

OPERATOR = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.budgets", "plm.halt"}))
NO_TEXTS = {"NUL": "a\0b", "half a pair": "\ud800", "blank": " \n", "without end": "x" * 100_000}
NO_AMOUNTS = {
    "NaN": Decimal("NaN"),
    "signalling": Decimal("sNaN"),
    "infinite": Decimal("Infinity"),
    "below": Decimal(-1),
    "float": 1.5,
    "int": 3,
    "text": "3",
    "none": None,
}


def named(name, unit="calls"):
    return BudgetKey.of(BudgetScope.AGENT, name, unit)


@pytest.mark.parametrize("text", NO_TEXTS.values(), ids=NO_TEXTS)
async def test_what_is_no_text_is_refused_wherever_people_write_one(bench, text):
    plane, tenant = bench.control_plane, bench.tenant
    await bench.run()
    limit, one = BudgetKey(scope=BudgetScope.TENANT, scope_id=tenant, unit="calls"), Decimal(1)
    correct = {"reason": "x", "command_id": "x", "by": OPERATOR}
    tries = {
        "subject": lambda: plane.set_budget(tenant, named(text), one, by=OPERATOR),
        "unit": lambda: plane.set_budget(tenant, named("a", unit=text), one, by=OPERATOR),
        "reason": lambda: plane.correct_budget(tenant, limit, one, **{**correct, "reason": text}),
        "command_id": lambda: plane.correct_budget(tenant, limit, one, **{**correct, "command_id": text}),
        "agent.name": lambda: bench.run(agent={"name": text, "plan": {}}),
        "idempotency_key": lambda: bench.run(idempotency_key=text, request_digest="d"),
    }
    before = bench.behind.rows("events")
    for field, attempt in tries.items():
        with pytest.raises(InvalidRequest) as caught:
            await attempt()
        assert caught.value.field == field
        assert len(str(caught.value)) < 300, "a refusal does not repeat what it refuses"
    for halt in ({"reason": text}, {"reason": "x", "subject": text}):
        with pytest.raises(InvalidRequest):
            await plane.halt(tenant, HaltScope.AGENT, None, **{"subject": "test", **halt}, by=OPERATOR)
    assert bench.behind.rows("events") == before


@pytest.mark.parametrize("amount", NO_AMOUNTS.values(), ids=NO_AMOUNTS)
async def test_what_is_no_amount_is_refused_wherever_one_is_asked_for(bench, amount):
    lease = await bench.lease()
    with pytest.raises(InvalidRequest):
        await bench.control_plane.set_budget(bench.tenant, named("a"), amount, by=OPERATOR)
    with pytest.raises(InvalidRequest):
        await bench.run(budget={"EUR": amount})
    helper = Delegation(
        to=uuid.uuid4(),
        scopes=frozenset({"plm.runs.create"}),
        share=amount,
        expires_at=datetime.now().astimezone() + timedelta(hours=1),
    )
    with pytest.raises(InvalidRequest):
        await bench.control_plane.delegate(lease.run, helper, bench.request())


@pytest.mark.parametrize(
    ("index", "attempt"), [(-1, 1), (0, 0), (0, -1), (2**31, 1), (0, 2**31), (2**200, 1)], ids=range(6)
)
async def test_a_step_or_attempt_of_no_number_is_not_proposed(bench, index, attempt):
    lease = await bench.lease()
    with pytest.raises(InvalidRequest) as caught:
        bench.proposal(lease, step_index=index, attempt=attempt)
    assert caught.value.field == "step_index"


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 11])
async def test_a_number_without_end_explains_nothing(bench, number):
    run = await bench.run()
    for asked in (f"{run.id}/{number}", f"{run.id}/1/{number}"):
        with pytest.raises((InvalidRequest, NotFound)):
            await bench.control_plane.why(bench.tenant, asked)


async def test_an_end_without_a_time_zone_is_refused(bench):
    naive = replace(bench.requester, expires_at=datetime(2100, 1, 1))  # noqa: DTZ001  # as the test says
    with pytest.raises(InvalidRequest, match="time zone"):
        await bench.run(principal=naive)


@pytest.mark.postgres_only
async def test_what_the_database_has_no_room_for_is_not_taken_for_a_database_that_is_away(bench):
    """Who is told that it is away tries again for ever."""
    bench.sql("CREATE TABLE narrow (name text PRIMARY KEY)")
    hashes = "SELECT string_agg(sha256(n::text::bytea)::text, '') FROM generate_series(1, 999) AS n"

    def insert():
        with translated():
            bench.sql(f"INSERT INTO narrow {hashes}")

    with pytest.raises(InvalidRequest, match="index row"):
        insert()
