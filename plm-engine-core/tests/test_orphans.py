"""Runs that a process outside drove and left: what they held comes back, and what nobody can know is parked."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from plm_engine_core.control_plane.errors import Conflict, FencingLost
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.vocabulary import (
    BudgetUnit,
    HaltScope,
    OutcomeStatus,
    RunKind,
    RunState,
    StepState,
    TicketState,
)

pytestmark = pytest.mark.every_storage

SCRIPT = Path(__file__).with_name("orphan.py")
LONGEST = 120.0  # seconds that anything here may take on a loaded machine


async def taken(bench, run=None):
    """The lease of a run of kind `external`."""
    run = run or await bench.run(kind=RunKind.EXTERNAL)
    lease = await bench.storage.runs.take(bench.tenant, run.id, owner="host", seconds=60, kind=RunKind.EXTERNAL)
    assert lease is not None
    return lease


async def left(bench, lease, **recovery):
    """Where a run stands whose holder is gone, after a sweep."""
    bench.let_lease_expire(lease.run)
    await Recovery(bench.storage, **recovery).sweep()
    return await bench.storage.runs.get(bench.tenant, lease.run.id)


async def calls(bench, lease):
    """The calls that the tenant has spent and reserved."""
    return await bench.budget(lease.run, "tenant", BudgetUnit.CALLS)


async def test_what_a_call_that_never_began_had_reserved_comes_back(bench):
    lease = await taken(bench)
    for step in range(3):
        await bench.grant(lease, step_index=step)
    assert (await left(bench, lease)).state is RunState.QUEUED
    assert await calls(bench, lease) == (0, 0)
    states = {step.state for step in await bench.storage.runs.steps(bench.tenant, lease.run.id)}
    assert states == {StepState.NOT_STARTED}
    assert (await taken(bench, lease.run)).fencing_token > lease.fencing_token


async def test_a_call_that_began_is_parked_as_unknown_and_charged(bench):
    lease = await taken(bench)
    await bench.begun(lease)
    run = await left(bench, lease)
    assert (run.state, run.reason) == (RunState.OUTCOME_UNKNOWN, "outcome_unknown")
    assert await calls(bench, lease) == (1, 0)
    await bench.storage.runs.reconcile(bench.tenant, run.id, happened=False, output=None, actor="human:x")
    assert (await left(bench, await taken(bench, run))).state is RunState.QUEUED


async def test_of_many_calls_that_began_each_is_parked_in_turn(bench):
    lease = await taken(bench)
    for step in range(2):
        await bench.begun(lease, step_index=step)
    await bench.grant(lease, step_index=2)
    for unknown in (1, 2):
        assert (await left(bench, lease)).state is RunState.OUTCOME_UNKNOWN
        assert await calls(bench, lease) == (unknown, 2 - unknown)
        await bench.storage.runs.reconcile(bench.tenant, lease.run.id, happened=True, output=None, actor="human:x")
    assert await bench.state(lease.run) is RunState.QUEUED


async def test_the_late_holder_can_write_nothing_more(bench):
    lease = await taken(bench)
    grant = await bench.begun(lease)
    await left(bench, lease)
    with pytest.raises(FencingLost):
        await bench.settle(grant, lease)


async def test_who_holds_a_run_is_left_alone(bench):
    lease = await taken(bench)
    await bench.begun(lease)
    bench.touched(lease.run.id, 1e6)
    await Recovery(bench.storage).sweep()
    assert await bench.state(lease.run) is RunState.RUNNING
    assert await calls(bench, lease) == (0, 1)


async def test_a_ticket_that_ran_out_and_a_halt_that_was_lifted_let_a_run_go_on(bench):
    _, pending = await bench.ask(await taken(bench))
    halted = await taken(bench)
    halt = await bench.halt(HaltScope.RUN, halted.run.id)
    assert (await left(bench, halted)).state is RunState.QUEUED  # whoever takes it finds the halt
    assert (
        await bench.storage.runs.take(bench.tenant, halted.run.id, owner="host", seconds=60, kind=RunKind.EXTERNAL)
        is None
    )
    assert await bench.state(halted.run) is RunState.HALTED
    bench.behind.set_time("halts", "lifted_at", 0, {"id": halt.id})
    bench.let_deadline_pass(pending)
    await Recovery(bench.storage).sweep()
    assert await bench.state(halted.run) is RunState.QUEUED
    ticket = await bench.storage.approvals.get(bench.tenant, pending.ticket_id)
    assert ticket.state is TicketState.EXPIRED
    assert await bench.state(await bench.storage.runs.get(bench.tenant, ticket.run_id)) is RunState.QUEUED


async def test_who_asked_for_its_cancel_has_it_cancelled(bench):
    lease = await taken(bench)
    await bench.grant(lease)
    await bench.control_plane.cancel(bench.tenant, lease.run.id, by=bench.requester)
    assert (await left(bench, lease)).state is RunState.CANCELLED
    assert await calls(bench, lease) == (0, 0)


async def test_what_nobody_takes_up_again_fails_as_abandoned(bench):
    run = await bench.run(kind=RunKind.EXTERNAL)
    await Recovery(bench.storage, forsaken_seconds=60).sweep()
    assert await bench.state(run) is RunState.QUEUED
    bench.touched(run.id, 61)
    await Recovery(bench.storage, forsaken_seconds=60).sweep()
    ended = await bench.storage.runs.get(bench.tenant, run.id)
    assert (ended.state, ended.reason) == (RunState.FAILED, "abandoned")


async def test_many_sweepers_at_once_close_each_call_once(bench):
    leases = [await taken(bench) for _ in range(6)]
    for number, lease in enumerate(leases):
        await (bench.begun if number % 2 else bench.grant)(lease)
        bench.let_lease_expire(lease.run)
    await asyncio.gather(*(Recovery(bench.storage).sweep() for _ in range(4)))
    await Recovery(bench.storage).sweep()
    states = [await bench.state(lease.run) for lease in leases]
    assert states == [RunState.QUEUED, RunState.OUTCOME_UNKNOWN] * 3
    assert await calls(bench, leases[0]) == (3, 0)
    for lease in leases:
        assert (await bench.kinds(lease.run)).count("step_settled") == 1


@pytest.mark.postgres_only
async def test_a_damaged_record_of_one_run_holds_up_no_other(bench, caplog):
    leases = [await taken(bench) for _ in range(3)]
    for lease in leases:
        await bench.grant(lease)
        bench.let_lease_expire(lease.run)
    hosted = await bench.run()
    bench.touched(hosted.id, 3600)
    bench.touched(leases[0].run.id, 3600)
    bench.sql("UPDATE run_states SET principal = '[]' WHERE run_id = %s", leases[0].run.id)
    assert await Recovery(bench.storage).sweep() == 1
    assert [await bench.state(lease.run) for lease in leases[1:]] == [RunState.QUEUED, RunState.QUEUED]
    assert "a run could not be closed yet" in caplog.text


@pytest.mark.postgres_only
@pytest.mark.parametrize(("begun", "state"), [(False, RunState.QUEUED), (True, RunState.OUTCOME_UNKNOWN)])
async def test_a_call_of_which_nobody_can_read_what_was_decided_is_closed_all_the_same(bench, begun, state):
    lease = await taken(bench)
    await (bench.begun(lease) if begun else bench.grant(lease))
    bench.sql("UPDATE run_steps SET decision = '{}' WHERE run_id = %s", lease.run.id)
    assert (await left(bench, lease)).state is state
    assert await calls(bench, lease) == (int(begun), 0)


async def test_a_run_does_not_end_before_its_calls_are_settled(bench):
    lease = await taken(bench)
    grant = await bench.grant(lease)
    held = {"fencing_token": lease.fencing_token, "actor": "test"}
    with pytest.raises(Conflict, match="settle it first"):
        await bench.control_plane.finish(lease.run, state=RunState.SUCCEEDED, **held)
    assert await bench.state(lease.run) is RunState.RUNNING
    await bench.settle(grant, lease, OutcomeStatus.NOT_STARTED)
    assert await bench.control_plane.finish(lease.run, state=RunState.SUCCEEDED, **held) is RunState.SUCCEEDED


@pytest.mark.postgres_only
@pytest.mark.parametrize("face", ["host", "governed"])
@pytest.mark.parametrize("moment", ["admitted", "begun"])
async def test_a_process_that_is_killed_in_a_call_leaves_nothing_reserved(bench, engine_database, face, moment):
    """A real process dies by SIGKILL between admit and begin, or between begin and settle."""
    command = [sys.executable, str(SCRIPT), face, moment, engine_database.app, str(bench.tenant)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(LONGEST):
        assert await process.stdout.readline() == b"now\n"
        process.kill()
        await process.wait()
    (run,) = await bench.storage.runs.list(bench.tenant, limit=9, before=None, state=None)
    assert run.state is RunState.RUNNING
    assert await bench.budget(run, "tenant", BudgetUnit.CALLS) == (0, 1)
    expected = RunState.QUEUED if moment == "admitted" else RunState.OUTCOME_UNKNOWN
    end = time.monotonic() + LONGEST
    while await bench.state(run) is RunState.RUNNING:
        assert time.monotonic() < end
        await Recovery(bench.storage).sweep()
        await asyncio.sleep(0.1)
    assert await bench.state(run) is expected
    spent = Decimal(0 if moment == "admitted" else 1)
    assert await bench.budget(run, "tenant", BudgetUnit.CALLS) == (spent, 0)


@pytest.mark.postgres_only
async def test_an_operator_says_at_the_terminal_what_became_of_a_call(terminal, tmp_path):
    bench = terminal.bench
    lease = await taken(bench)
    await bench.begun(lease)
    run = await left(bench, lease)
    output = tmp_path / "output.json"
    reconcile = ("run", "reconcile", run.id, "--happened", "--output", output, "--tenant-id")
    for wrong in ("[" * 100_000, "{", "\ufeff{}"):
        output.write_text(wrong, encoding="utf-8")
        assert "cannot be read as JSON" in (await terminal.run(*reconcile, bench.tenant, status=2)).stderr
    output.write_text('{"n": NaN}', encoding="utf-8")
    assert "output.n: is nan" in (await terminal.run(*reconcile, bench.tenant, status=1)).stderr
    output.write_text('{"n": 1}', encoding="utf-8")
    nobody = "00000000-0000-0000-0000-000000000000"
    assert f"tenant {nobody} does not exist [not_found]" in (await terminal.run(*reconcile, nobody, status=1)).stderr
    assert (await terminal.json(*reconcile, bench.tenant))["state"] == "queued"
    (step,) = await bench.storage.runs.steps(bench.tenant, run.id)
    assert (step.state, step.output) == (StepState.SUCCEEDED, {"n": 1})
    assert await calls(bench, lease) == (1, 0)
