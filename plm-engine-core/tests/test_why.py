"""`plm-cli why`: from the records alone, what was decided, where, by what, and what would unblock it."""

from __future__ import annotations

import asyncio
import functools
import json
import uuid
from dataclasses import replace
from datetime import UTC, timedelta
from decimal import Decimal
from typing import Any

import pytest
from plm_engine_core.cli import build_app
from plm_engine_core.control_plane.errors import InvalidRequest, NotFound
from plm_engine_core.control_plane.events import run_stream
from plm_engine_core.control_plane.limits import BudgetKey
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import (
    BudgetScope,
    BudgetUnit,
    HaltScope,
    Period,
    Reason,
    RunKind,
    RunState,
    TicketDecision,
)
from plm_engine_core.control_plane.why import UNBLOCKED_BY, why
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

pytestmark = pytest.mark.every_storage


async def asked(bench: Any, identifier: object) -> Any:
    return await why(bench.storage, bench.tenant, str(identifier))


def test_every_reason_has_what_unblocks_it() -> None:
    assert set(UNBLOCKED_BY) == set(Reason)


async def test_a_rule_that_denied_is_named_with_its_stage(bench: Any) -> None:
    other = bench.with_policy(tiers={"thing.read": "blocked"})
    lease = await bench.lease()
    await other.control_plane.admit(bench.proposal(lease))
    answer = await asked(bench, f"{lease.run.id}/0")
    assert (answer.kind, answer.state, answer.id) == ("attempt", "denied", f"{lease.run.id}/0/1")
    assert answer.stage == "classify"
    assert (answer.rule, answer.reason) == ("tiers.thing.read", "capability_blocked")
    assert answer.unblocked_by
    assert await asked(bench, f"{lease.run.id}/0/1") == answer


async def test_what_the_books_refused_is_told_with_its_limit_whatever_the_policy_said(bench: Any) -> None:
    run = await bench.run(budget={BudgetUnit.CALLS: Decimal(1)})
    lease = await bench.lease(run)
    await bench.grant(lease)
    await bench.control_plane.admit(bench.proposal(lease, step_index=1, step_id="second"))
    answer = await asked(bench, f"{run.id}/1")
    assert (answer.reason, answer.stage) == ("budget_exceeded", "cost_budget")
    assert (answer.limit["scope"], answer.limit["unit"], answer.limit["limit"]) == ("run", "calls", "1")
    assert "higher run budget" in answer.unblocked_by
    budget = await asked(bench, f"{run.id}/calls")
    assert (budget.state, budget.limit["reserved"]) == ("exhausted", "1")
    assert "the end of calls" in budget.unblocked_by
    tenant = await asked(bench, f"{bench.tenant}/EUR")
    assert (tenant.kind, tenant.state, tenant.unblocked_by) == ("budget", "open", "")


LIMITED = [
    {"scope": "run_group", "unit": "calls", "limit": 1},
    {"scope": "agent", "per": "day", "unit": "calls", "limit": 1},
    {"scope": "user", "per": "week", "unit": "calls", "limit": 1},
    {"scope": "team", "unit": "calls", "limit": 1},
    {"scope": "tenant", "per": "month", "unit": "calls", "limit": 1},
]


@pytest.mark.parametrize("limit", LIMITED, ids=lambda limit: limit["scope"])
async def test_each_budget_that_binds_is_explained_by_whose_it_is(bench: Any, limit: dict[str, Any]) -> None:
    user, group = bench.requester.user_id, uuid.uuid4()
    bench = bench.with_policy(limits=[limit], teams={"night": [str(user)]})
    lease = await bench.lease(await bench.run(run_group_id=group))
    await bench.grant(lease)
    await bench.control_plane.admit(bench.proposal(lease, step_index=1, step_id="second"))
    refused = (await asked(bench, f"{lease.run.id}/1")).limit
    assert refused["scope"] == limit["scope"]
    names = {"run_group": group, "agent": "test", "user": user, "team": "night", "tenant": bench.tenant}
    window = f"/{limit['per']}" if "per" in limit else ""
    name = f"{limit['scope']}/{names[limit['scope']]}/calls{window}"
    answer = await asked(bench, name)
    assert (answer.kind, answer.id, answer.state) == ("budget", name, "exhausted")
    assert (answer.limit["limit"], answer.limit["reserved"]) == ("1", "1")
    assert answer.rule == f"limits.{limit['scope']}"
    assert "the end of calls" in answer.unblocked_by
    assert ("the next" in answer.unblocked_by) is bool(window)


async def test_a_limit_that_an_operator_set_is_said_to_be_theirs_whatever_its_unit_and_name(bench: Any) -> None:
    operator = replace(bench.approver, scopes=frozenset({"plm.budgets"}))
    key = BudgetKey.of(BudgetScope.MODEL, "maker/model-2", "gpu_seconds", Period.MONTH)
    limit = {"scope": "model", "per": "month", "unit": "gpu_seconds", "limit": "9"}
    bench = bench.with_policy(units=["gpu_seconds"], limits=[limit])
    await bench.control_plane.set_budget(bench.tenant, key, Decimal(7), by=operator)
    answer = await bench.control_plane.why(bench.tenant, "model/maker/model-2/gpu_seconds/month")
    assert (answer.state, answer.rule, answer.limit["limit"]) == ("open", "set by an operator", "7")
    with pytest.raises(NotFound):
        await asked(bench, "model/maker/model-2/gpu_seconds")


@pytest.mark.postgres_only
async def test_times_are_those_of_utc_whatever_the_time_zone_of_the_server(bench: Any) -> None:
    lease, pending = await bench.ask()
    elsewhere = make_conninfo(bench.database.app, options="-c TimeZone=Asia/Tokyo")
    async with open_pool(elsewhere) as pool:
        storage = PostgresStorage(pool, bench.storage.runs._delivery)
        answer = await why(storage, bench.tenant, str(pending.ticket_id))
        assert f"waits until {pending.deadline.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" in answer.message
        assert (await storage.approvals.get(bench.tenant, pending.ticket_id)).deadline.utcoffset() == timedelta(0)
        bench.let_deadline_pass(pending)
        await Recovery(storage).sweep()
    told = await bench.storage.events.read(bench.tenant, run_stream(lease.run.id))
    (expired,) = [each.data for each in told if each.kind == "approval_expired"]
    assert expired["deadline"].endswith("+00:00")


@pytest.mark.parametrize("scope", ["run", "run_group", "agent", "tenant", "system"])
async def test_a_queued_run_over_which_a_halt_stands_waits_for_no_run_worker(bench: Any, scope: str) -> None:
    run = await bench.run(run_group_id=(group := uuid.uuid4()))
    other = await bench.run()
    named = {"run": run.id, "run_group": group}.get(scope)
    halt = await bench.halt(HaltScope(scope), named, subject="test" if scope == "agent" else None, reason="look first")
    answer = await asked(bench, run.id)
    assert (answer.state, answer.reason) == ("queued", "halted")
    assert answer.message == f"a {scope} halt stands: look first"
    assert answer.unblocked_by == f"lifting the halt {halt.id}, or cancelling the run"
    assert ((await asked(bench, other.id)).reason == "halted") is (scope not in ("run", "run_group"))
    await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
    assert "run worker" in (await asked(bench, run.id)).unblocked_by


async def test_a_halt_is_where_it_stopped_and_lifting_it_the_way_on(bench: Any) -> None:
    lease = await bench.lease()
    await bench.halt(HaltScope.RUN, lease.run.id, reason="look first")
    await bench.control_plane.admit(bench.proposal(lease))
    await bench.control_plane.finish(
        lease.run, fencing_token=lease.fencing_token, state=RunState.HALTED, actor="worker:w", reason="halted",
        message="a run halt stands: look first",
    )  # fmt: skip
    answer = await asked(bench, lease.run.id)
    assert (answer.kind, answer.state, answer.reason) == ("run", "halted", "halted")
    assert "lifting the halt" in answer.unblocked_by
    assert (answer.because.stage, answer.because.reason) == ("halt", "halted")


async def test_each_halt_that_stands_over_a_parked_run_now_is_named_from_wide_to_narrow(bench: Any) -> None:
    lease = await bench.lease()
    narrow = await bench.halt(HaltScope.CAPABILITY, subject="thing.read", reason="look first")
    await bench.control_plane.admit(bench.proposal(lease))
    await bench.control_plane.finish(
        lease.run, fencing_token=lease.fencing_token, state=RunState.HALTED, actor="worker:w", reason="halted",
        message="a capability halt stands: look first",
    )  # fmt: skip
    wide = await bench.halt(HaltScope.TENANT, reason="and think")
    await bench.halt(HaltScope.CAPABILITY, subject="thing.fire")
    answer = await asked(bench, lease.run.id)
    assert answer.message == "a tenant halt stands: and think; a capability halt stands: look first"
    assert answer.unblocked_by == f"lifting the halt {wide.id} and the halt {narrow.id}, or cancelling the run"
    await bench.control_plane.lift(bench.tenant, narrow.id, by=bench.approver)
    answer = await asked(bench, lease.run.id)
    assert (answer.state, answer.message) == ("halted", "a tenant halt stands: and think")
    assert str(narrow.id) not in answer.unblocked_by


async def test_a_run_that_waits_for_an_approval_under_a_halt_is_told_of_both(bench: Any) -> None:
    lease, _ = await bench.ask()
    halt = await bench.halt(HaltScope.CAPABILITY, subject="thing.write")
    answer = await asked(bench, lease.run.id)
    assert (answer.state, answer.reason) == ("awaiting_approval", "approval_required")
    assert "approval by a person" in answer.unblocked_by
    assert answer.unblocked_by.endswith(f", and lifting the halt {halt.id}")


async def test_a_run_whose_halt_was_lifted_elsewhere_waits_for_recovery(bench: Any) -> None:
    halt = await bench.halt(HaltScope.SYSTEM)
    neighbour = bench.other()
    run = await neighbour.run()
    assert await neighbour.storage.runs.take(neighbour.tenant, run.id, owner="w", seconds=60) is None
    assert str(halt.id) in (await asked(neighbour, run.id)).unblocked_by
    await bench.control_plane.lift(bench.tenant, halt.id, by=bench.approver)
    answer = await asked(neighbour, run.id)
    assert (answer.state, "recovery" in answer.unblocked_by) == ("halted", True)
    assert await Recovery(bench.storage).sweep() == 1
    assert "run worker" in (await asked(neighbour, run.id)).unblocked_by


async def test_a_ticket_is_told_through_its_life(bench: Any) -> None:
    lease, pending = await bench.ask()
    run = await asked(bench, lease.run.id)
    assert (run.state, run.because.reason, run.because.because.id) == (
        "awaiting_approval", "approval_required", str(pending.ticket_id),
    )  # fmt: skip
    assert "approval by a person" in run.unblocked_by
    waiting = await asked(bench, pending.ticket_id)
    assert (waiting.kind, waiting.state) == ("ticket", "pending")
    assert waiting.unblocked_by == f"{run.unblocked_by}, none of whom asked for it"
    assert run.because.because == waiting
    await bench.decide(pending, TicketDecision.DENY, comment="not today")
    denied = await asked(bench, pending.ticket_id)
    assert denied.state == "denied"
    assert "not today" in denied.message
    queued = await asked(bench, lease.run.id)
    assert "run worker" in queued.unblocked_by
    assert queued.because.unblocked_by == ""  # the attempt waits for no human any more


async def test_a_ticket_says_how_many_people_it_needs(bench: Any) -> None:
    _, pending = await bench.with_policy(approval={"quorum": 2}).ask()
    waiting = await asked(bench, pending.ticket_id)
    assert "approval by 2 people with plm.hitl.resolve" in waiting.unblocked_by


async def test_no_approval_is_said_to_help_once_another_policy_is_active(bench: Any, make_policy: Any) -> None:
    lease, pending = await bench.ask()
    operator = replace(bench.approver, scopes=bench.approver.scopes | {"plm.policy.activate"})
    activate = functools.partial(bench.control_plane.activate_policy, bench.tenant, reason="to try", by=operator)
    same = await activate(bench.control_plane.policy, previous=None)
    assert "approval by a person" in (await asked(bench, pending.ticket_id)).unblocked_by
    await activate(make_policy(version="other"), previous=same.digest)
    run = await asked(bench, lease.run.id)
    for each in (run, run.because, run.because.because, await asked(bench, pending.ticket_id)):
        assert "another policy was activated since" in each.unblocked_by
    await bench.decide(pending, TicketDecision.APPROVE)
    assert (await asked(bench, pending.ticket_id)).unblocked_by == ""


async def test_what_a_run_that_failed_would_need_is_for_a_new_one(bench: Any) -> None:
    lease = await bench.lease()
    denied = await bench.control_plane.admit(bench.proposal(lease, capability="thing.gone"))
    await bench.control_plane.finish(
        lease.run,
        fencing_token=lease.fencing_token,
        state=RunState.FAILED,
        actor="worker:test",
        reason=denied.reason.value,
    )
    told = await asked(bench, lease.run.id)
    assert told.because.unblocked_by == denied.unblock
    assert told.unblocked_by == f"{denied.unblock}, and a new run"


async def test_a_ticket_that_nobody_can_decide_any_more_is_told_with_its_cause(bench: Any) -> None:
    lease, replaced = await bench.ask()
    await bench.decide(replaced, TicketDecision.DENY)
    lease = await bench.lease(lease.run)
    await bench.control_plane.admit(
        bench.proposal(lease, capability="thing.write", ticket_id=replaced.ticket_id)
    )  # the denial is heard
    _, cancelled = await bench.ask(lease, attempt=2, arguments={"name": "two"})
    await bench.control_plane.cancel(bench.tenant, lease.run.id, by=bench.requester)
    answer = await asked(bench, cancelled.ticket_id)
    assert (answer.state, answer.message) == ("cancelled", "its run ended before anybody decided it")
    lease, replaced = await bench.ask()
    await bench.decide(replaced, TicketDecision.APPROVE)
    _, newer = await bench.ask(await bench.lease(lease.run), attempt=2, arguments={"name": "two"})
    answer = await asked(bench, replaced.ticket_id)
    assert (answer.state, answer.message.endswith(f"; ticket {newer.ticket_id} took its place")) == ("approved", True)
    bench.behind.set_rows("approval_tickets", {"id": replaced.ticket_id}, state="cancelled")
    answer = await asked(bench, replaced.ticket_id)
    assert answer.message == f"its step was proposed again; ticket {newer.ticket_id} took its place"


async def test_a_run_of_a_program_outside_waits_for_that_program(bench: Any) -> None:
    run = await bench.run(kind=RunKind.EXTERNAL)
    assert (await asked(bench, run.id)).unblocked_by == "whoever made it, who takes it up again"
    lease = await bench.storage.runs.take(bench.tenant, run.id, owner="host", seconds=60, kind=RunKind.EXTERNAL)
    assert lease is not None
    assert (await asked(bench, run.id)).unblocked_by == "nothing: whoever made it moves it forward"


async def test_what_goes_well_is_blocked_by_nothing(bench: Any) -> None:
    lease = await bench.lease()
    grant = await bench.begun(lease)
    await bench.settle(grant, lease)
    answer = await asked(bench, f"{lease.run.id}/0/1")
    assert (answer.state, answer.reason, answer.unblocked_by) == ("succeeded", None, "")


async def test_nothing_of_another_tenant_is_explained(bench: Any) -> None:
    other = bench.behind.new_tenant()
    lease, pending = await bench.ask()
    for name in (
        lease.run.id,
        pending.ticket_id,
        f"{lease.run.id}/0",
        f"{lease.run.id}/EUR",
        f"{bench.tenant}/EUR",
        "agent/test/EUR",
    ):
        with pytest.raises(NotFound):
            await why(bench.storage, other, str(name))


@pytest.mark.parametrize(
    "name", ["", "x", "1/2", f"{uuid.UUID(int=1)}/1/2/3", f"{uuid.UUID(int=1)}/1/x", "user/x/EUR", "run"]
)
async def test_a_name_of_no_form_is_refused(bench: Any, name: str) -> None:
    with pytest.raises(InvalidRequest):
        await asked(bench, name)


@pytest.mark.postgres_only
@pytest.mark.parametrize("decision", ["[]", "1", '"deny"', "null", "{}", '{"stages": 5}', '{"stages": [1]}'])
async def test_a_decision_that_cannot_be_read_hides_nothing_else(bench: Any, decision: str) -> None:
    lease, pending = await bench.ask()
    bench.sql("UPDATE run_steps SET decision = %s", decision)
    answer = await asked(bench, lease.run.id)
    assert (answer.state, answer.because.state) == ("awaiting_approval", "awaiting_approval")
    assert answer.because.message == "what was decided cannot be read from its record"
    assert answer.because.because.id == str(pending.ticket_id)


@pytest.mark.postgres_only
@pytest.mark.parametrize("change", ["principal = '[]'", 'principal = \'{"user_id": "x"}\''])
async def test_a_run_whose_record_is_damaged_is_refused_in_one_sentence(
    bench: Any, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = await bench.run()
    bench.sql(f"UPDATE run_states SET {change}")  # noqa: S608  # one of the literals above
    with pytest.raises(InvalidRequest, match=f"the record of {run.id} cannot be read: "):
        await asked(bench, run.id)
    assert [record.exc_info is not None for record in caplog.records if record.message == "a record cannot be read"]


@pytest.mark.postgres_only
async def test_the_terminal_says_it_in_words_and_in_json(bench: Any) -> None:
    lease, _ = await bench.ask()

    def run(*arguments: str) -> Any:
        command = ["why", *arguments, "--tenant-id", str(bench.tenant)]
        return CliRunner().invoke(build_app(), command, env={"PG_DSN": bench.database.app})

    told = await asyncio.to_thread(run, str(lease.run.id))
    assert told.exit_code == 0, told.output
    assert "unblocked by approval by a person" in told.stdout
    answer = json.loads((await asyncio.to_thread(run, str(lease.run.id), "--json")).stdout)
    assert (answer["kind"], answer["because"]["because"]["kind"]) == ("run", "ticket")
    unknown = await asyncio.to_thread(run, str(uuid.uuid4()))
    assert (unknown.exit_code, unknown.stdout) == (1, "")
