"""How jobs go, with either store: refused, ordered, repeated, limited, cancelled, followed, forgotten."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import tracemalloc
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import (
    CallContext,
    ErrorCategory,
    FromStep,
    InMemoryJobStore,
    Job,
    JobEvent,
    JobEventType,
    JobQueue,
    JobRequest,
    JobSequence,
    JobStatus,
    LocalJobStore,
    MachineResources,
    PluginDisabledError,
    PluginInputError,
    PluginManager,
    PluginMeta,
    PluginNotLoadedError,
    PluginResourceError,
    ResultFile,
    RetryPolicy,
    SequenceStep,
    StoreError,
    WireValueError,
)

MetaFactory = Callable[..., PluginMeta]
MakeQueue = Callable[..., Any]

SOON = RetryPolicy(base_seconds=0.0, max_seconds=0.01)


@pytest.fixture(params=["memory", "sqlite"])
async def make_queue(
    request: pytest.FixtureRequest, manager: PluginManager, tmp_path: Path
) -> AsyncIterator[MakeQueue]:
    """Make a queue over either kind of store; it is closed at the end."""
    queues: list[JobQueue] = []

    def make(**options: Any) -> JobQueue:
        store = InMemoryJobStore() if request.param == "memory" else LocalJobStore(tmp_path / f"jobs-{len(queues)}.db")
        queues.append(JobQueue(manager, store=options.pop("store", store), **options))
        return queues[-1]

    yield make
    for queue in queues:
        await queue.close(0.0)


@pytest.fixture
def jobber_meta(probe_meta: MetaFactory) -> MetaFactory:
    """Describe the jobber."""

    def make(name: str = "jobber", **code: Any) -> PluginMeta:
        return probe_meta("Jobber", "jobber", name, **code)

    return make


@pytest.fixture
async def jobber(manager: PluginManager, jobber_meta: MetaFactory) -> PluginManager:
    await manager.load_plugin_async(jobber_meta())
    return manager


@pytest.fixture
async def jobs(make_queue: MakeQueue, jobber: PluginManager) -> JobQueue:
    queue: JobQueue = make_queue()
    await queue.start()
    return queue


async def ended(queue: JobQueue, job_id: str) -> Job:
    return await queue.wait_for_job(job_id, 60)


async def running(queue: JobQueue, job_id: str) -> None:
    """Return when the plugin itself has reported from within the job."""
    async for event in queue.events(job_id):
        if event.type is JobEventType.PROGRESS_CHANGED:
            return


def kinds(events: list[JobEvent]) -> list[str]:
    return [event.type.value for event in events]


def moves(events: list[JobEvent]) -> list[str]:
    return [event.payload["to"] for event in events if event.type is JobEventType.STATE_TRANSITION]


# -- refused at submit


async def test_what_can_never_run_is_refused_at_submit(jobs: JobQueue, jobber: PluginManager) -> None:
    with pytest.raises(PluginNotLoadedError, match="nobody"):
        await jobs.submit("nobody")
    await jobber.disable_plugin_async("jobber")
    with pytest.raises(PluginDisabledError, match="enable_plugin"):
        await jobs.submit("jobber", action="job.value")
    with pytest.raises(PluginDisabledError):
        await jobs.submit_sequence([SequenceStep(plugin_instance_id="jobber")])
    assert jobs.get_stats().total_pending == 0


@pytest.mark.parametrize(
    ("needs", "resource", "needed", "available"),
    [
        ({"cpu_slots": 3}, "cpu_slots", 3, 2),
        ({"min_system_ram_mb": 5000}, "memory_mb", 5000, 1000),
        ({"requires_gpu": True, "min_gpu_vram_mb": 9}, "gpu_memory_mb", 9, 8),
        ({"devices": ["scanner"]}, "device:scanner", 1, 0),
        ({"tokens": {"license": 2}}, "token:license", 2, 1),
    ],
)
async def test_a_job_too_big_for_the_machine_is_refused_with_the_numbers(
    make_queue: MakeQueue,
    manager: PluginManager,
    jobber_meta: MetaFactory,
    needs: dict[str, Any],
    resource: str,
    needed: float,
    available: float,
) -> None:
    machine = MachineResources(cpu_slots=2, memory_mb=1000, gpu_memory_mb=8, tokens={"license": 1})
    await manager.load_plugin_async(jobber_meta(resources=needs))
    queue = make_queue(resources=machine)
    with pytest.raises(PluginResourceError, match=f"needs {needed} of {resource}.*has {available}") as caught:
        await queue.submit("jobber", action="job.value")
    shortfall = caught.value.resource_shortfall
    assert shortfall is not None
    assert (shortfall.resource, shortfall.needed, shortfall.available) == (resource, needed, available)


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), object()])
async def test_arguments_that_cannot_reach_a_plugin_are_refused_at_submit(jobs: JobQueue, value: object) -> None:
    with pytest.raises(WireValueError, match=r"kwargs\.value\[0\]"):
        await jobs.submit("jobber", action="job.value", value=[value])
    assert jobs.get_stats().total_pending == 0


async def test_arguments_in_files_are_paths_as_soon_as_they_are_submitted(jobs: JobQueue, tmp_path: Path) -> None:
    class Table:
        def to_temp_file(self) -> Path:
            return tmp_path / "table.csv"

    job_id = await jobs.submit("jobber", action="job.value", value=Table())
    step = SequenceStep(plugin_instance_id="jobber", kwargs={"action": "job.value", "value": Table()})
    sequence = await jobs.wait_for_sequence(await jobs.submit_sequence([step]), 60)
    results = [(await ended(jobs, job_id)).result, sequence.results[0].result]
    assert results == [str(tmp_path / "table.csv")] * 2


async def test_a_store_on_disk_refuses_what_it_could_not_carry_on(jobber: PluginManager, tmp_path: Path) -> None:
    async def allow() -> bool:
        return True

    async with JobQueue(jobber, store=LocalJobStore(tmp_path / "jobs.db")) as queue:
        with pytest.raises(PluginInputError, match="before_start"):
            await queue.submit("jobber", action="job.value", before_start=allow)
        with pytest.raises(WireValueError, match="value"):
            await queue.submit("jobber", action="job.value", value={1, 2})
        assert queue.get_stats().total_pending == 0


# -- in parallel, by resources


async def test_jobs_wait_for_what_others_hold_and_say_what_it_is(
    make_queue: MakeQueue, manager: PluginManager, jobber_meta: MetaFactory
) -> None:
    for name in ("one", "two"):
        await manager.load_plugin_async(jobber_meta(name, resources={"devices": ["scanner"], "cpu_slots": 0.5}))
    await manager.load_plugin_async(jobber_meta("free"))
    queue = make_queue(resources=MachineResources(cpu_slots=2, memory_mb=1, devices=frozenset({"scanner"})))
    await queue.start()
    first = await queue.submit("one", action="job.silent")
    await running(queue, first)
    second = await queue.submit("two", action="job.value")
    third = await queue.submit("free", action="job.value")
    assert (await ended(queue, third)).status is JobStatus.COMPLETED, "it needs no scanner"
    reason = queue.get_job(second).block_reason
    assert reason is not None
    assert (reason.resource, reason.needed, reason.available, reason.holders) == ("device:scanner", 1, 0, (first,))
    assert "needs 1 of device:scanner, and 0 are free; held by" in reason.text
    told = [event async for event in take(queue.events(second), 1)]
    assert (kinds(told), told[0].payload["resource"]) == (["block_reason_changed"], "device:scanner")
    await queue.cancel(first)
    assert (await ended(queue, second)).status is JobStatus.COMPLETED


async def test_memory_counts_as_it_was_measured_when_that_is_more_than_was_stated(
    make_queue: MakeQueue, manager: PluginManager, jobber_meta: MetaFactory
) -> None:
    for name in ("one", "two"):
        await manager.load_plugin_async(jobber_meta(name, resources={"min_system_ram_mb": 0.1}))
        await manager.execute_plugin_async(name, action="job.value")
    peaks = {each.instance_id: each.memory_mb_peak_max or 0.0 for each in await manager.get_empirical_records_async()}
    assert min(peaks.values()) > 1, "a worker takes more than was stated"
    queue = make_queue(resources=MachineResources(cpu_slots=2, memory_mb=1.5 * max(peaks.values())))
    await queue.start()
    first = await queue.submit("one", action="job.silent")
    await running(queue, first)
    second = await queue.submit("two", action="job.value")
    reason = queue.get_job(second).block_reason
    assert reason is not None
    assert (reason.resource, reason.needed, reason.holders) == ("memory_mb", peaks["two"], (first,))
    await queue.cancel(first)
    assert (await ended(queue, second)).status is JobStatus.COMPLETED


async def take(events: AsyncIterator[JobEvent], count: int) -> AsyncIterator[JobEvent]:
    for _ in range(count):
        yield await anext(events)


async def test_owners_share_a_worker_whoever_submitted_more(jobs: JobQueue) -> None:
    block = await jobs.submit("jobber", action="job.silent", owner="x")
    await running(jobs, block)
    many = [await jobs.submit("jobber", action="job.value", owner="many") for _ in range(20)]
    few = [await jobs.submit("jobber", action="job.value", owner="few") for _ in range(2)]
    await jobs.cancel(block)
    await ended(jobs, few[1])
    pending = sum(jobs.get_job(job_id).status is JobStatus.PENDING for job_id in many)
    assert pending >= 10, "the two of the other owner did not wait for all twenty"
    await asyncio.gather(*(ended(jobs, job_id) for job_id in many))


async def test_a_waiting_job_can_be_put_before_others(make_queue: MakeQueue, jobber: PluginManager) -> None:
    queue = make_queue()
    first, second = [await queue.submit("jobber", action="job.value") for _ in range(2)]
    assert await queue.reorder(second, 5)
    assert [job.id for job in queue.get_pending()] == [second, first]
    await queue.start()
    jobs = [await ended(queue, job_id) for job_id in (first, second)]
    assert jobs[1].started_at < jobs[0].started_at
    assert not await queue.reorder(first, 1), "it has ended"
    with pytest.raises(ValueError, match="no job"):
        await queue.reorder("nobody", 1)
    with pytest.raises(ValueError, match=r"no job 'x{79};"):
        queue.get_job("x" * 10_000)


@pytest.mark.parametrize("priority", [float("nan"), 1.5, 10**30, "high"])
async def test_a_waiting_job_takes_no_priority_that_makes_no_sense(
    make_queue: MakeQueue, jobber: PluginManager, priority: Any
) -> None:
    queue = make_queue()
    job_id = await queue.submit("jobber", action="job.value")
    with pytest.raises(ValueError, match="priority must be"):
        await queue.reorder(job_id, priority)
    assert queue.get_job(job_id).priority == 0


# -- events


async def test_events_are_numbered_without_a_gap_and_a_slow_follower_misses_none(jobs: JobQueue) -> None:
    job_id = await jobs.submit("jobber", action="job.steps", count=50, lines=300)
    slow: list[JobEvent] = []
    async for event in jobs.events(job_id):
        slow.append(event)
        if len(slow) < 5:
            await ended(jobs, job_id)
    assert [event.number for event in slow] == list(range(1, len(slow) + 1))
    assert kinds(slow).count("log_appended") == 300
    assert kinds(slow).count("progress_changed") == 50
    assert moves(slow) == ["running", "completed"]
    assert slow[-1].type is JobEventType.STATE_TRANSITION
    assert [event async for event in jobs.events(job_id, after=slow[-3].number)] == slow[-2:]


async def test_hundreds_follow_one_job_and_each_sees_all_of_it(jobs: JobQueue) -> None:
    job_id = await jobs.submit("jobber", action="job.steps", count=20)

    async def follow() -> list[int]:
        return [event.number async for event in jobs.events(job_id)]

    seen = await asyncio.gather(*(follow() for _ in range(300)))
    assert {tuple(numbers) for numbers in seen} == {tuple(range(1, len(seen[0]) + 1))}


async def test_a_flood_of_lines_is_limited_and_a_flood_of_progress_thinned(
    make_queue: MakeQueue, jobber: PluginManager
) -> None:
    queue = make_queue(max_log_events=10)
    await queue.start()
    job_id = await queue.submit("jobber", action="job.steps", count=3000, lines=50)
    await ended(queue, job_id)
    events = [event async for event in queue.events(job_id)]
    assert (kinds(events).count("log_appended"), kinds(events).count("events_limited")) == (10, 1)
    reports = [event.payload["progress"] for event in events if event.type is JobEventType.PROGRESS_CHANGED]
    assert 100 < len(reports) < 3000
    assert (reports, reports[-1]) == (sorted(reports), 1.0)
    assert len(queue.get_job_logs(job_id).splitlines()) == 50, "the log has them all"


async def test_all_events_of_the_queue_can_be_followed_in_their_order(jobs: JobQueue) -> None:
    follower = jobs.all_events()
    first = asyncio.create_task(anext(follower))
    await asyncio.sleep(0)
    ids = [await jobs.submit("jobber", action="job.steps", count=3) for _ in range(3)]
    for job_id in ids:
        await ended(jobs, job_id)
    seen = [await first]
    while sum(event.payload.get("to") == "completed" for event in seen) < 3:
        seen.append(await anext(follower))
    positions = [event.position for event in seen]
    assert positions == sorted(set(positions))
    again = [event async for event in take(jobs.all_events(after=seen[4].position), len(seen) - 5)]
    assert again == seen[5:]


# -- again


async def test_no_job_is_repeated_unless_that_was_asked_for(jobs: JobQueue) -> None:
    job = await ended(jobs, await jobs.submit("jobber", action="job.flaky", failures=1))
    assert (job.status, job.retry_count) == (JobStatus.FAILED, 0)


async def test_a_passing_failure_is_tried_again_as_the_policy_says(jobs: JobQueue) -> None:
    request = JobRequest(plugin_instance_id="jobber", kwargs={"action": "job.flaky", "failures": 2}, retry=SOON)
    job_id = await jobs.submit_request(request)
    job = await ended(jobs, job_id)
    assert (job.status, job.result, job.retry_count) == (JobStatus.COMPLETED, 3, 2)
    events = [event async for event in jobs.events(job_id)]
    assert moves(events) == ["running", "pending", "running", "pending", "running", "completed"]
    retries = [event.payload for event in events if event.type is JobEventType.RETRY_STARTED]
    assert [payload["attempt"] for payload in retries] == [1, 2]
    assert retries[0]["exception_category"] == "transient"


@pytest.mark.parametrize(
    ("policy", "after", "attempts"),
    [
        (RetryPolicy(max_attempts=2, base_seconds=0, max_seconds=0), None, 2),
        (RetryPolicy(categories=frozenset({ErrorCategory.RESOURCE})), None, 1),
        (RetryPolicy(base_seconds=0, max_seconds=5), 6.0, 1),
    ],
    ids=["as often as allowed", "not of this category", "told to wait longer than allowed"],
)
async def test_what_the_policy_does_not_cover_fails(
    jobs: JobQueue, policy: RetryPolicy, after: float | None, attempts: int
) -> None:
    arguments = {"action": "job.flaky", "failures": 9, "after": after}
    job = await ended(
        jobs, await jobs.submit_request(JobRequest(plugin_instance_id="jobber", kwargs=arguments, retry=policy))
    )
    assert job.error is not None
    assert (job.status, job.error.message, job.retry_count) == (JobStatus.FAILED, f"attempt {attempts}", attempts - 1)


async def test_the_plugins_own_advice_is_waited_for_and_said(jobs: JobQueue) -> None:
    arguments = {"action": "job.flaky", "failures": 1, "after": 100.0}
    job_id = await jobs.submit_request(JobRequest(plugin_instance_id="jobber", kwargs=arguments, retry=RetryPolicy()))
    async for event in jobs.events(job_id):
        if event.type is JobEventType.RETRY_STARTED:
            assert 100 <= event.payload["wait_seconds"] <= 100
        if event.payload.get("to") == "pending":
            break
    reason = jobs.get_job(job_id).block_reason
    assert reason is not None
    assert reason.resource == "retry"
    assert (await ended(jobs, await jobs.submit("jobber", action="job.value", value=1))).result == 1, "its slot is free"
    assert await jobs.cancel(job_id)
    assert jobs.get_job(job_id).status is JobStatus.CANCELLED


@pytest.mark.parametrize("idempotent", [True, False])
async def test_after_a_shortage_only_an_idempotent_job_gets_a_new_worker_once(
    make_queue: MakeQueue, manager: PluginManager, jobber_meta: MetaFactory, idempotent: bool
) -> None:
    await manager.load_plugin_async(jobber_meta(idempotent=idempotent))
    await manager.load_plugin_async(jobber_meta("idle"))
    queue = make_queue(retry=RetryPolicy())
    await queue.start()
    job = await ended(queue, await queue.submit("jobber", action="job.hungry"))
    assert job.status is (JobStatus.COMPLETED if idempotent else JobStatus.FAILED)
    assert job.retry_count == (1 if idempotent else 0)
    assert manager.get_instance("idle").alive is not idempotent, "idle workers made room"


async def test_an_ended_job_can_be_submitted_again_where_its_arguments_are_kept(jobs: JobQueue) -> None:
    job_id = await jobs.submit("jobber", action="job.value", value=[1], priority=2, call=CallContext("mine", "acme"))
    await ended(jobs, job_id)
    if not jobs.get_job(job_id).args and not jobs.get_job(job_id).kwargs:
        with pytest.raises(ValueError, match="no longer kept"):
            await jobs.retry(job_id)
        return
    again = await ended(jobs, await jobs.retry(job_id))
    assert (again.result, again.priority, again.id != job_id) == ([1], 2, True)
    waiting = await jobs.submit("jobber", action="job.silent")
    with pytest.raises(ValueError, match="has not ended"):
        await jobs.retry(waiting)


# -- time


async def test_a_deadline_ends_a_job_that_waits_and_one_that_runs(jobs: JobQueue) -> None:
    def request(seconds: float) -> JobRequest:
        return JobRequest(plugin_instance_id="jobber", kwargs={"action": "job.silent"}, deadline_seconds=seconds)

    runs = await jobs.submit_request(request(3.0))
    await running(jobs, runs)
    waits = await jobs.submit_request(request(0.05))
    for job_id in (waits, runs):
        job = await ended(jobs, job_id)
        assert job.error is not None
        assert (job.status, job.error.error_type) == (JobStatus.FAILED, "PluginTimeoutError")
        assert (job.started_at is None) == (job_id == waits)


async def test_a_deadline_ends_also_a_job_whose_plugin_the_next_host_does_not_have(
    jobber: PluginManager, tmp_path: Path
) -> None:
    first = JobQueue(jobber, store=LocalJobStore(tmp_path / "jobs.db"))
    late, waits = [
        await first.submit_request(JobRequest(plugin_instance_id="jobber", deadline_seconds=seconds))
        for seconds in (0.2, None)
    ]
    await first.close()
    await jobber.unload_plugin_async("jobber")
    async with JobQueue(jobber, store=LocalJobStore(tmp_path / "jobs.db")) as second:
        job = await ended(second, late)
        assert job.error is not None
        assert (job.status, job.error.error_type) == (JobStatus.FAILED, "PluginTimeoutError")
        assert second.get_job(waits).status is JobStatus.PENDING


async def test_a_job_that_reports_nothing_for_too_long_is_ended(jobs: JobQueue) -> None:
    request = JobRequest(plugin_instance_id="jobber", kwargs={"action": "job.silent"}, no_progress_seconds=1.0)
    job = await ended(jobs, await jobs.submit_request(request))
    assert job.error is not None
    assert (job.status, job.error.error_type) == (JobStatus.FAILED, "PluginTimeoutError")
    assert "no progress was reported for 1.0 s (last: 50% and no further)" in job.error.message
    assert job.error.outcome_known, "the plugin ended by itself when it was asked"


# -- cancelling


async def test_cancelling_goes_through_its_phases(make_queue: MakeQueue, probe: PluginManager) -> None:
    queue = make_queue()
    await queue.start()
    for action, phases in (
        ("probe.polite", ["cooperative", "completed"]),
        ("probe.stubborn", ["cooperative", "force", "reloading", "completed"]),
    ):
        job_id = await queue.submit("probe", action=action)
        await running(queue, job_id)
        assert await queue.cancel(job_id)
        events = [event async for event in queue.events(job_id)]
        told = [event.payload["to"] for event in events if event.type is JobEventType.CANCEL_PHASE_CHANGED]
        assert (told, moves(events)[-1], queue.get_job(job_id).cancel_phase) == (phases, "cancelled", "completed")


async def test_the_loop_goes_on_while_a_job_is_cancelled_by_force(make_queue: MakeQueue, probe: PluginManager) -> None:
    queue = make_queue()
    await queue.start()
    stubborn = await queue.submit("probe", action="probe.stubborn")
    await running(queue, stubborn)
    cancelling = asyncio.create_task(queue.cancel(stubborn))
    turns = 0
    while not cancelling.done():
        turns += 1
        await asyncio.sleep(0.001)
    assert turns > 3, "nothing kept the loop from turning during the grace"
    assert (await ended(queue, await queue.submit("probe", action="probe.echo", x=1))).result == {"x": 1}


# -- sequences


def value(*args: Any, **kwargs: Any) -> SequenceStep:
    return SequenceStep(plugin_instance_id="jobber", args=args, kwargs=kwargs)


async def sequence_ended(queue: JobQueue, sequence_id: str) -> JobSequence:
    return await queue.wait_for_sequence(sequence_id, 60)


async def test_a_step_uses_what_earlier_ones_gave(jobs: JobQueue) -> None:
    steps = [
        value(action="job.value", value={"rows": [[1, 2], [3, 4]]}),
        value(action="job.value", value=[FromStep(0, "rows", 1), {"whole": FromStep(0)}]),
    ]
    sequence_id = await jobs.submit_sequence(steps)
    sequence = await sequence_ended(jobs, sequence_id)
    assert sequence.status == "completed"
    assert sequence.results[1].result == [[3, 4], {"whole": {"rows": [[1, 2], [3, 4]]}}]
    events = [event async for event in jobs.events_for_sequence(sequence_id)]
    assert moves(events) == ["running", "completed", "running", "completed"]
    (advanced,) = [event for event in events if event.type is JobEventType.SEQUENCE_ADVANCED]
    assert advanced.payload == {
        "prior_job_id": sequence.results[0].job_id,
        "prior_step_index": 0,
        "prior_success": True,
    }
    assert (advanced.sequence_id, advanced.sequence_index) == (sequence_id, 1)
    later = [event async for event in jobs.events_for_sequence(sequence_id, after=events[-2].position)]
    assert later == events[-1:]


@pytest.mark.parametrize("fail_fast", [True, False])
async def test_a_failed_step_ends_a_sequence_or_is_only_noted(jobs: JobQueue, fail_fast: bool) -> None:
    steps = [
        value(action="job.flaky", failures=9),
        value(action="job.value", value=FromStep(0)),
        value(action="job.value", value=1),
    ]
    sequence = await sequence_ended(jobs, await jobs.submit_sequence(steps, fail_fast=fail_fast))
    successes = [result.success for result in sequence.results]
    assert (sequence.status, successes) == (("failed", [False]) if fail_fast else ("completed", [False, False, True]))
    if not fail_fast:
        error = sequence.results[1].error
        assert error is not None
        assert "step 0 is needed" in error.message


@pytest.mark.parametrize("fail_fast", [True, False])
async def test_cancelling_a_sequence_or_its_job_ends_both_as_cancelled(jobs: JobQueue, fail_fast: bool) -> None:
    for cancel_whole in (True, False):
        steps = [value(action="job.silent"), value(action="job.value")]
        sequence_id = await jobs.submit_sequence(steps, fail_fast=fail_fast)
        job_id = jobs.get_sequence(sequence_id).current_job_id
        assert job_id is not None
        await running(jobs, job_id)
        assert await (jobs.cancel_sequence(sequence_id) if cancel_whole else jobs.cancel(job_id))
        sequence = await sequence_ended(jobs, sequence_id)
        assert (sequence.status, len(sequence.results)) == ("cancelled", 1)
        assert jobs.get_job(job_id).status is JobStatus.CANCELLED
        assert not await jobs.cancel_sequence(sequence_id), "it has ended"


async def test_a_step_whose_plugin_went_away_has_failed(
    jobs: JobQueue, jobber: PluginManager, jobber_meta: MetaFactory
) -> None:
    await jobber.load_plugin_async(jobber_meta("leaves"))
    steps = [value(action="job.silent"), SequenceStep(plugin_instance_id="leaves")]
    sequence_id = await jobs.submit_sequence(steps, fail_fast=False)
    first = jobs.get_sequence(sequence_id).current_job_id or ""
    await running(jobs, first)
    await jobber.unload_plugin_async("leaves")
    worker = jobber.get_instance("jobber").pid
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    sequence = await sequence_ended(jobs, sequence_id)
    assert [result.error.error_type for result in sequence.results if result.error] == [
        "WorkerDiedError",
        "PluginNotLoadedError",
    ]


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (SequenceStep(plugin_instance_id="jobber", priority=10**30), "priority"),
        (SequenceStep(plugin_instance_id="jobber", args=(nested(10**5),)), "nested too deeply"),
        (SequenceStep(plugin_instance_id="nobody"), "nobody"),
    ],
    ids=["priority", "depth", "instance"],
)
async def test_a_sequence_with_a_later_step_that_can_never_be_is_refused_whole(
    jobs: JobQueue, step: SequenceStep, words: str
) -> None:
    with pytest.raises((PluginInputError, ValueError, PluginNotLoadedError), match=words):
        await jobs.submit_sequence([value(action="job.value"), step])
    assert (jobs.get_stats().total_pending, jobs.get_pending()) == (0, [])


async def test_what_of_a_sequence_cannot_be_kept_is_refused_before_any_of_it_is(
    jobber: PluginManager, tmp_path: Path
) -> None:
    async with JobQueue(jobber, store=LocalJobStore(tmp_path / "jobs.db")) as queue:
        with pytest.raises(WireValueError, match=r"kwargs\.value"):
            await queue.submit_sequence([value(action="job.value"), value(action="job.value", value={1, 2})])
        together = [value(action="job.value", value="x" * (5 << 20)) for _ in range(2)]
        with pytest.raises(WireValueError, match=r"steps: .* over the limit"):
            await queue.submit_sequence(together)
        assert (queue.get_stats().total_pending, queue.get_pending(), queue.get_running()) == (0, [], [])


async def test_uniform_and_empty_sequences(jobs: JobQueue) -> None:
    sequence_id = await jobs.submit_uniform_sequence(
        "jobber", kwargs_list=[{"action": "job.value", "value": n} for n in range(3)], priority=2
    )
    sequence = await sequence_ended(jobs, sequence_id)
    assert [result.result for result in sequence.results] == [0, 1, 2]
    assert jobs.get_job(sequence.results[0].job_id).priority == 2
    empty = await jobs.submit_sequence([])
    assert jobs.get_sequence(empty).status == "completed"
    with pytest.raises(ValueError, match="has 1 entries, and kwargs_list 2"):
        await jobs.submit_uniform_sequence("jobber", [[1]], [{}, {}])
    with pytest.raises(PluginInputError, match="step 0 refers to step 0"):
        await jobs.submit_sequence([value(FromStep(0))])
    with pytest.raises(PluginNotLoadedError):
        await jobs.submit_sequence([value(), SequenceStep(plugin_instance_id="nobody")])
    with pytest.raises(ValueError, match="no sequence"):
        jobs.get_sequence("nobody")


# -- what is kept


async def test_only_the_last_ended_jobs_and_their_events_are_kept(make_queue: MakeQueue, jobber: PluginManager) -> None:
    queue = make_queue(max_history=3)
    await queue.start()
    ids = [await queue.submit("jobber", action="job.value", value=n) for n in range(6)]
    for job_id in ids:
        await queue.cancel(job_id) if job_id == ids[4] else await ended_or_gone(queue, job_id)
    last = await ended(queue, await queue.submit("jobber", action="job.value"))
    assert [job.id for job in queue.get_history()] == [last.id, ids[5], ids[4]]
    assert queue.get_history(1)[0].id == last.id
    stats = queue.get_stats()
    assert stats.total_completed + stats.total_cancelled == 3
    with pytest.raises(ValueError, match="the last 3 are kept"):
        queue.events(ids[0])


async def ended_or_gone(queue: JobQueue, job_id: str) -> None:
    try:
        await ended(queue, job_id)
    except ValueError:
        return


async def test_jobs_older_than_the_limit_are_forgotten(make_queue: MakeQueue, jobber: PluginManager) -> None:
    queue = make_queue(max_age_seconds=0.3)
    await queue.start()
    job_id = await queue.submit("jobber", action="job.value")
    await ended(queue, job_id)
    async with asyncio.timeout(30):
        while queue.get_history():  # noqa: ASYNC110 - forgetting makes no event
            await asyncio.sleep(0.01)
    assert queue.get_stats().total_completed == 0


async def test_a_large_result_is_a_file_and_serves_later_steps_all_the_same(
    jobber: PluginManager, tmp_path: Path
) -> None:
    store = LocalJobStore(tmp_path / "jobs.db", max_result_bytes=1000)
    async with JobQueue(jobber, store=store) as queue:
        steps = [value(action="job.bytes", count=5000), value(action="job.value", value=FromStep(0))]
        sequence = await sequence_ended(queue, await queue.submit_sequence(steps))
        for result in sequence.results:
            assert isinstance(result.result, ResultFile)
            assert result.result.load() == b"x" * 5000


async def test_memory_stays_flat_however_many_jobs_there_were(make_queue: MakeQueue, jobber: PluginManager) -> None:
    queue = make_queue(max_history=20)
    await queue.start()

    async def run(count: int) -> int:
        for _ in range(count // 20):
            ids = [await queue.submit("jobber", action="job.steps", count=2, owner=f"owner-{n}") for n in range(20)]
            await asyncio.gather(*(ended_or_gone(queue, job_id) for job_id in ids))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = await run(100)
        after = await run(300)
    finally:
        tracemalloc.stop()
    assert after - before < 300 * 500, "less than a job takes"
    assert jobber.get_instance("jobber").running_calls == 0


async def test_what_an_earlier_host_left_of_any_tenant_goes_on_once_a_job_is_submitted_for_its_instance(
    jobber: PluginManager, jobber_meta: MetaFactory, tmp_path: Path
) -> None:
    earlier = JobQueue(jobber, store=LocalJobStore(tmp_path / "jobs.db"))
    left = [
        await earlier.submit("jobber", action="job.value", value=tenant, call=CallContext(tenant, tenant))
        for tenant in ("acme", "umbrella")
    ]
    await earlier.close()
    await jobber.unload_plugin_async("jobber")
    async with JobQueue(jobber, store=LocalJobStore(tmp_path / "jobs.db")) as queue:
        await jobber.load_plugin_async(jobber_meta())
        await ended(queue, await queue.submit("jobber", action="job.value", call=CallContext("now", "acme")))
        assert [(await ended(queue, job_id)).result for job_id in left] == ["acme", "umbrella"]


async def test_a_waiting_job_is_nothing_that_the_collector_of_garbage_must_look_into(
    make_queue: MakeQueue, jobber: PluginManager
) -> None:
    queue = make_queue()

    async def submit(count: int) -> int:
        for number in range(count):
            job_id = await queue.submit(
                "jobber",
                action="job.value",
                value=[number, {"rows": [number]}],
                owner=f"owner-{number % 10}",
                call=CallContext(f"call-{number}", "acme"),
            )
            await queue.reorder(job_id, number % 3)
            assert queue.get_job(job_id).kwargs["value"] == [number, {"rows": [number]}]
        for _ in range(3):  # a tuple of tuples is found to be plain a collection after those are
            gc.collect()
        return len(gc.get_objects())

    before = await submit(100)
    after = await submit(500)
    assert (after - before) / 500 < 0.2
    assert [job.priority for job in queue.get_pending()] == sorted(n % 3 for n in [*range(100), *range(500)])[::-1]


async def test_ids_sort_as_their_jobs_were_submitted(make_queue: MakeQueue, jobber: PluginManager) -> None:
    """So a store on disk adds to the end of its indices, and a long queue costs it no more pages than an empty one."""
    queue = make_queue()
    ids = [await queue.submit("jobber", action="job.value") for _ in range(20)]
    ids += await asyncio.gather(*(queue.submit("jobber", action="job.value") for _ in range(20)))
    assert ids == sorted(ids)
    assert len({job_id[-18:] for job_id in ids}) == len(ids)
    assert {len(job_id) for job_id in ids} == {32}


async def test_what_was_submitted_is_sent_whatever_becomes_of_the_callers_values(
    make_queue: MakeQueue, jobber: PluginManager
) -> None:
    queue = make_queue()
    value = [1, b"raw"]
    waits = await queue.submit("jobber", action="job.value", value=value)
    value.append(2)
    await queue.start()
    runs = await queue.submit("jobber", action="job.value", value=value)
    value.append(3)
    assert [(await ended(queue, job_id)).result for job_id in (waits, runs)] == [[1, b"raw"], [1, b"raw", 2]]


async def test_when_nothing_can_be_kept_any_more_nothing_is_started_or_confirmed(
    jobber: PluginManager, tmp_path: Path
) -> None:
    store = LocalJobStore(tmp_path / "jobs.db")
    queue = JobQueue(jobber, store=store)
    await queue.start()
    runs = await queue.submit("jobber", action="job.silent")
    await running(queue, runs)
    waits = await queue.submit("jobber", action="job.value")
    follower = asyncio.create_task(follow_to_the_end(queue, waits))
    await asyncio.sleep(0)
    assert store._writer is not None
    os.kill(store._writer._process.pid, signal.SIGKILL)
    store._writer._process.wait()
    with pytest.raises(StoreError, match="cannot be written"):
        await queue.submit("jobber", action="job.value")
    with pytest.raises(StoreError, match="cannot be written"):
        await follower
    reason = queue.get_job(waits).block_reason
    assert reason is not None
    assert "cannot be written" in reason.text
    await queue.cancel(runs)
    with pytest.raises(StoreError, match="cannot be written"):
        await queue.wait_for_job(runs, 60)
    await queue.close(0.0)
    async with JobQueue(jobber, store=LocalJobStore(tmp_path / "jobs.db")) as again:
        assert (await ended(again, waits)).status is JobStatus.COMPLETED, "nothing that was confirmed is lost"
        assert again.get_job(runs).status is JobStatus.INTERRUPTED


async def follow_to_the_end(queue: JobQueue, job_id: str) -> None:
    async for _ in queue.events(job_id):
        pass


async def test_snapshots_are_taken_while_a_job_runs(make_queue: MakeQueue, jobber: PluginManager) -> None:
    queue = make_queue(snapshot_seconds=0.05)
    await queue.start()
    job_id = await queue.submit("jobber", action="job.silent")
    async for event in queue.events(job_id):
        if event.type is JobEventType.RESOURCE_SNAPSHOT:
            assert event.payload["snapshot"]["worker_pid"] == jobber.get_instance("jobber").pid
            break
    snapshot = queue.get_resource_snapshot(job_id)
    assert snapshot is not None
    assert snapshot.memory_rss_mb > 0
    await queue.cancel(job_id)


async def test_the_state_for_a_user_interface(jobs: JobQueue) -> None:
    done = await jobs.submit("jobber", action="job.value")
    await ended(jobs, done)
    runs = await jobs.submit("jobber", action="job.silent")
    await running(jobs, runs)
    waits = await jobs.submit("jobber", action="job.value")
    state = jobs.get_state()
    assert [[job.id for job in state[key]] for key in ("running", "pending", "history")] == [[runs], [waits], [done]]
    assert (state["stats"].total_running, state["stats"].total_pending, state["stats"].total_completed) == (1, 1, 1)


async def test_a_job_that_names_no_call_has_a_step_key_of_its_own(jobs: JobQueue) -> None:
    job = await ended(jobs, await jobs.submit("jobber", action="job.key"))
    assert job.result == job.id, "so that an idempotent plugin knows a repeated job"
    assert job.submitted_at <= datetime.now(UTC)
