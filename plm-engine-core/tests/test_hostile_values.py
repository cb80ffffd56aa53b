"""Values that nobody should send: each is refused by its name, by either storage, and leaves the books as they were."""

from __future__ import annotations

import math
import uuid
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from plm_engine_core.agent_runtime import Driver, Selector
from plm_engine_core.control_plane import Outcome, Principal
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest, NotFound
from plm_engine_core.control_plane.hitl import ScopeTerms
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.registry import Delegation
from plm_engine_core.control_plane.storage.postgres.gateway import translated
from plm_engine_core.control_plane.vocabulary import BudgetScope, HaltScope, OutcomeStatus, TicketDecision, TicketState

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
    run = await bench.run()
    limit, one = BudgetKey(scope=BudgetScope.TENANT, scope_id=tenant, unit="calls"), Decimal(1)
    correct = {"reason": "x", "command_id": "x", "by": OPERATOR}
    tries = {
        "subject": lambda: plane.set_budget(tenant, named(text), one, by=OPERATOR),
        "unit": lambda: plane.set_budget(tenant, named("a", unit=text), one, by=OPERATOR),
        "reason": lambda: plane.correct_budget(tenant, limit, one, **{**correct, "reason": text}),
        "command_id": lambda: plane.correct_budget(tenant, limit, one, **{**correct, "command_id": text}),
        "name": lambda: plane.mark(tenant, run.id, text, command_id="x", by=bench.requester),
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
    ("given", "field"),
    [
        ({"arguments": {"a": {"b": math.nan}}}, "arguments.a.b"),
        ({"arguments": {"name": math.nan}, "capability": "thing.write"}, "arguments.name"),
        ({"claims": {"score": math.inf}}, "claims.score"),
        ({"resource": "\ud800"}, "resource"),
    ],
)
async def test_what_cannot_be_proposed_is_named_as_the_proposal_has_it(bench, given, field):
    lease = await bench.lease()
    with pytest.raises(InvalidRequest, match=f"recorded: {field}: ") as caught:
        await bench.control_plane.admit(bench.proposal(lease, **given))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"output": {"a": math.nan}}, "output.a"),
        ({"error": {"message": "\ud800"}}, "error.message"),
        ({"layers": ["x" * 17_000_000]}, "layers"),
        ({"usage": {"thing": 1}}, "usage.thing"),
        ({"usage": {"thing": "1"}}, "usage.thing"),
    ],
    ids=range(5),
)
async def test_what_cannot_be_settled_is_named_as_the_outcome_has_it_and_settles_nothing(bench, given, field):
    lease = await bench.lease()
    grant = await bench.begun(lease)
    with pytest.raises(InvalidRequest) as caught:
        await bench.settle(grant, lease, **given)
    assert caught.value.field == field
    assert (await bench.settle(grant, lease)).spent["calls"] == "1"


@pytest.mark.parametrize(
    ("terms", "field"),
    [
        ({"uses": 0}, "scope.uses"),
        ({"uses": 1.5}, "scope.uses"),
        ({"uses": True}, "scope.uses"),
        ({"seconds": 0}, "scope.seconds"),
        ({"seconds": math.nan}, "scope.seconds"),
        ({"seconds": "1"}, "scope.seconds"),
    ],
)
async def test_terms_of_an_approval_scope_that_are_none_are_refused_with_what_they_were(bench, terms, field):
    _, pending = await bench.ask()
    offered = ScopeTerms(**{"uses": 1, "seconds": 60, **terms})
    with pytest.raises(InvalidRequest, match=f"not {next(iter(terms.values()))!r}$") as caught:
        await bench.decide(pending, TicketDecision.APPROVE, scope=offered)
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["a\0", "\ud800"], ids=["nul", "surrogate"])
async def test_a_comment_that_cannot_be_stored_is_refused_by_its_field(bench, text):
    _, pending = await bench.ask()
    gate = bench.control_plane.approvals
    for field, attempt in {
        "comment": lambda: bench.decide(pending, TicketDecision.DENY, comment=text),
        "body": lambda: gate.comment(bench.tenant, pending.ticket_id, text, author=bench.approver),
    }.items():
        with pytest.raises(InvalidRequest) as caught:
            await attempt()
        assert caught.value.field == field


async def test_a_word_of_no_vocabulary_is_refused_and_one_said_as_plain_text_is_taken_for_what_it_is(bench):
    plane, tenant, approver = bench.control_plane, bench.tenant, bench.approver
    human = replace(approver, scopes=frozenset({"plm.halt", "plm.policy.activate", "plm.hitl.resolve"}))
    _, pending = await bench.ask()
    before = bench.behind.rows("events")
    put = {"previous": None, "reason": "x", "by": human}
    tries = {
        "scope": lambda word: plane.halt(tenant, word, reason="x", by=human),
        "role": lambda word: plane.activate_policy(tenant, plane.policy, role=word, **put),
        "decision": lambda word: plane.decide(tenant, pending.ticket_id, word, approver=human),
        "status": lambda word: plane.set_agent_status(tenant, "test", word, reason="x", by=human),
    }
    for field, attempt in tries.items():
        for word in ("king", "", None, 5, ["active"]):
            with pytest.raises(InvalidRequest) as caught:
                await attempt(word)
            assert caught.value.field == field
    with pytest.raises(Forbidden, match=r"plm\.halt\.system"):
        await plane.halt(tenant, "system", reason="x", by=human)
    with pytest.raises(InvalidRequest, match="nothing could be decided"):
        await plane.activate_policy(tenant, None, role="active", **put)
    assert bench.behind.rows("events") == before
    assert (await plane.halt(tenant, "tenant", reason="x", by=human)).scope is HaltScope.TENANT
    assert (await plane.decide(tenant, pending.ticket_id, "deny", approver=human)).state is TicketState.DENIED


async def test_what_is_of_another_type_than_documented_is_refused_by_its_field(bench):
    plane, tenant, by = bench.control_plane, bench.tenant, bench.approver
    _, pending = await bench.ask()
    ticket = pending.ticket_id
    tries = {
        "comment": lambda: plane.decide(tenant, ticket, TicketDecision.DENY, approver=by, comment=None),
        "body": lambda: plane.approvals.comment(tenant, ticket, None, author=by),
        "seconds": lambda: plane.approvals.wait(tenant, ticket, seconds=None),
        "reason": lambda: plane.halt(tenant, HaltScope.TENANT, reason=None, by=by),
        "limit": lambda: plane.feed(tenant, limit="5"),
        "cursor": lambda: plane.feed(tenant, cursor=5),
        "name": lambda: plane.acquire_lease(tenant, None, owner="a", seconds=1, by=by),
        "id": lambda: plane.why(tenant, None),
        "agent": lambda: bench.run(agent="test"),
        "input": lambda: bench.run(input=None),
        "trace_id": lambda: bench.run(trace_id=None),
    }
    for field, attempt in tries.items():
        with pytest.raises(InvalidRequest) as caught:
            await attempt()
        assert caught.value.field == field
    for seconds in (None, "1", True, 10**400):
        with pytest.raises(InvalidRequest, match="at most 86400 seconds"):
            await plane.acquire_lease(tenant, "a", owner="a", seconds=seconds, by=by)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("user_id", None),
        ("user_id", "x"),
        ("actor_kind", "king"),
        ("actor_kind", None),
        ("actor_kind", ["human"]),
        ("scopes", "plm.halt.system plm.runs.create"),
        ("scopes", ["plm.runs.create"]),
        ("scopes", None),
        ("scopes", frozenset({"a", 1})),
        ("delegated_by", ("x",)),
        ("delegated_by", None),
        ("expires_at", "tomorrow"),
        ("delegations_left", "1"),
    ],
    ids=range(13),
)
def test_a_principal_that_is_none_is_refused_when_it_is_made(member, value):
    """Above all a text in the place of scopes: each part of it would be one that it holds."""
    with pytest.raises(InvalidRequest) as caught:
        replace(OPERATOR, **{member: value})
    assert caught.value.field == f"principal.{member}"


@pytest.mark.parametrize(
    ("field", "value"),
    [("to", None), ("to", "x"), ("scopes", ["plm.runs.create"]), ("scopes", None), ("expires_at", None)],
    ids=str,
)
async def test_terms_of_a_delegation_that_are_none_are_refused_by_their_field(bench, field, value):
    terms = Delegation(
        to=uuid.uuid4(),
        scopes=frozenset({"plm.runs.create"}),
        share=Decimal(1),
        expires_at=datetime.now().astimezone() + timedelta(hours=1),
    )
    run = await bench.run()
    with pytest.raises(InvalidRequest) as caught:
        await bench.control_plane.delegate(run, replace(terms, **{field: value}), bench.request())
    assert caught.value.field == field


async def test_an_act_of_nobody_is_refused_by_its_field(bench):
    plane, tenant = bench.control_plane, bench.tenant
    lease, pending = await bench.ask()
    halt = await plane.halt(tenant, HaltScope.AGENT, subject="test", reason="x", by=OPERATOR)
    held = await plane.acquire_lease(tenant, "a", owner="a", seconds=9, by=OPERATOR)
    budget, one = BudgetKey(scope=BudgetScope.TENANT, scope_id=tenant, unit="calls"), Decimal(1)
    ticket, gate = pending.ticket_id, plane.approvals
    put = {"previous": None, "reason": "x"}
    before = bench.behind.rows("events")
    for nobody in (None, "human:1", uuid.uuid4()):
        tries = [
            ("approver", lambda who: plane.decide(tenant, ticket, TicketDecision.DENY, approver=who)),
            ("author", lambda who: gate.comment(tenant, ticket, "x", author=who)),
            ("by", lambda who: gate.revoke_scope(tenant, uuid.uuid4(), by=who)),
            ("by", lambda who: plane.halt(tenant, HaltScope.TENANT, reason="x", by=who)),
            ("by", lambda who: plane.lift(tenant, halt.id, by=who)),
            ("by", lambda who: plane.set_agent_status(tenant, "test", "suspended", reason="x", by=who)),
            ("by", lambda who: plane.activate_policy(tenant, plane.policy, **put, by=who)),
            ("by", lambda who: plane.set_budget(tenant, budget, one, by=who)),
            ("by", lambda who: plane.correct_budget(tenant, budget, one, reason="x", command_id="x", by=who)),
            ("by", lambda who: plane.mark(tenant, lease.run.id, "x", command_id="x", by=who)),
            ("by", lambda who: plane.cancel(tenant, lease.run.id, by=who)),
            ("by", lambda who: plane.acquire_lease(tenant, "b", owner="a", seconds=9, by=who)),
            ("by", lambda who: plane.release_lease(held, by=who)),
            ("principal", lambda who: plane.create_run(bench.request(), principal=who)),
        ]
        for field, attempt in tries:
            with pytest.raises(InvalidRequest, match="must be the Principal whose act it is") as caught:
                await attempt(nobody)
            assert caught.value.field == field
    assert bench.behind.rows("events") == before


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, None, "9", 86_401])
async def test_a_lease_that_has_no_end_or_no_time_is_not_given(bench, seconds):
    run = await bench.run()
    with pytest.raises(InvalidRequest, match="a lease is for more than 0") as caught:
        await bench.storage.runs.take(bench.tenant, run.id, owner="w", seconds=seconds)
    assert caught.value.field == "seconds"
    lease = await bench.lease(run)
    with pytest.raises(InvalidRequest, match="a lease is for more than 0"):
        await bench.storage.runs.renew(bench.tenant, run.id, fencing_token=lease.fencing_token, seconds=seconds)
    with pytest.raises(InvalidRequest, match="a lease is for more than 0"):
        Driver(control_plane=bench.control_plane, agents=None, selector=Selector([]), owner="w", lease_seconds=seconds)


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_page_of_no_event_is_refused(bench, limit):
    with pytest.raises(InvalidRequest, match=f"not {limit}") as caught:
        await bench.control_plane.feed(bench.tenant, limit=limit)
    assert caught.value.field == "limit"


@pytest.mark.parametrize("asked", ["agent", "agent/reviewer", "run", "tenant/day", "model//EUR"])
async def test_a_budget_that_is_not_named_is_told_how_one_is(bench, asked):
    with pytest.raises(InvalidRequest, match=r"names nothing; give RUN, .* SCOPE/NAME/UNIT"):
        await bench.control_plane.why(bench.tenant, asked)


@pytest.mark.parametrize(
    ("index", "attempt"), [(-1, 1), (0, 0), (0, -1), (2**31, 1), (0, 2**31), (2**200, 1)], ids=range(6)
)
async def test_a_step_or_attempt_of_no_number_is_not_proposed(bench, index, attempt):
    lease = await bench.lease()
    with pytest.raises(InvalidRequest) as caught:
        bench.proposal(lease, step_index=index, attempt=attempt)
    assert caught.value.field == "step_index"


NO_MEMBERS = [
    ("tenant_id", "x"),
    ("run_id", None),
    ("step_id", None),
    ("capability", None),
    ("resource", 5),
    ("arguments", [1]),
    ("arguments", "x"),
    ("principal", None),
    ("executor_kind", "x"),
    ("ticket_id", "x"),
    ("agent", None),
    ("step_index", "1"),
    ("step_index", True),
    ("attempt", "1"),
    ("attempt", True),
]


@pytest.mark.parametrize(("member", "value"), NO_MEMBERS, ids=str)
async def test_a_proposal_of_other_types_is_not_made_and_names_them(bench, member, value):
    lease = await bench.lease()
    with pytest.raises(InvalidRequest, match="another type") as caught:
        bench.proposal(lease, **{member: value})
    assert caught.value.field == member


@pytest.mark.parametrize(
    ("member", "value"),
    [("status", "x"), ("evidence", None), ("error", "x"), ("usage", [1]), ("artifacts", None), ("layers", "x")],
    ids=str,
)
def test_an_outcome_of_other_types_is_not_made_and_names_them(member, value):
    with pytest.raises(InvalidRequest, match="another type") as caught:
        Outcome(**{"status": OutcomeStatus.SUCCEEDED, member: value})
    assert caught.value.field == member


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
