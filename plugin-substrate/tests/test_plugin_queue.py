from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable

import pytest
from plugin_substrate import (
    CallContext,
    JobEventType,
    JobQueue,
    JobStatus,
    PluginManager,
    PluginMeta,
    PluginNotLoadedError,
)

MetaFactory = Callable[..., PluginMeta]


@pytest.fixture
async def jobs(probe: PluginManager) -> AsyncIterator[JobQueue]:
    """A started queue over the probe."""
    queue = JobQueue(probe)
    await queue.start()
    yield queue
    await queue.stop(0.0)


async def running(queue: JobQueue, job_id: str) -> None:
    """Return when the plugin itself has reported from within the job."""
    async for event in queue.events(job_id):
        if event.type is JobEventType.PROGRESS_CHANGED:
            return


async def allow() -> bool:
    return True


async def test_a_job_runs_and_keeps_result_usage_and_times(jobs: JobQueue) -> None:
    job_id = await jobs.submit("probe", action="probe.report", steps=2, owner="acme")
    job = await jobs.wait_for_job(job_id, 30)
    assert (job.status, job.result.name, job.usage, job.progress) == (
        JobStatus.COMPLETED,
        "report.txt",
        {"pages": 2, "bytes": 10.5},
        1.0,
    )
    assert job.started_at is not None
    assert job.completed_at is not None
    assert job.submitted_at <= job.started_at <= job.completed_at
    assert (job.owner, job.error) == ("acme", None)


async def test_higher_priorities_go_first_and_equals_in_the_order_of_submission(probe: PluginManager) -> None:
    queue = JobQueue(probe)
    order: list[str] = []

    async def note(name: str) -> bool:
        order.append(name)
        return True

    for name, priority in (("late", -1), ("first", 5), ("a", 0), ("b", 0), ("second", 5)):
        await queue.submit("probe", action="probe.echo", priority=priority, before_start=lambda name=name: note(name))
    await queue.start()
    last = await queue.submit("probe", action="probe.echo", priority=-9)
    await queue.wait_for_job(last, 30)
    assert order == ["first", "second", "a", "b", "late"]


async def test_jobs_run_in_parallel_up_to_the_slots_of_their_instance(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(probe_meta(), max_concurrent_requests=2)
    queue = JobQueue(manager)
    await queue.start()
    pair = [await queue.submit("probe", action="probe.meet") for _ in range(2)]
    assert [(await queue.wait_for_job(job_id, 30)).status for job_id in pair] == ["completed", "completed"]
    waiters = [await queue.submit("probe", action="probe.polite") for _ in range(3)]
    await asyncio.gather(*(running(queue, job_id) for job_id in waiters[:2]))
    assert [queue.get_job(job_id).status for job_id in waiters] == ["running", "running", "pending"]
    reason = queue.get_job(waiters[2]).block_reason
    assert "all 2 slots of 'probe'" in str(reason)
    assert waiters[0] in str(reason)
    await queue.stop(0.0)
    assert queue.get_job(waiters[2]).block_reason.text == "the queue is not started"


@pytest.mark.parametrize("answer", ["no", "error"])
async def test_a_job_that_may_not_start_is_not_sent_and_says_so(jobs: JobQueue, answer: str) -> None:
    async def refuse() -> bool:
        if answer == "error":
            raise TimeoutError("the database did not answer")
        return False

    job_id = await jobs.submit("probe", action="probe.count", before_start=refuse)
    job = await jobs.wait_for_job(job_id, 30)
    assert (job.status, job.started_at) == (JobStatus.NOT_STARTED, None)
    if answer == "error":
        assert job.error is not None
        assert "the database did not answer" in job.error.message
    else:
        assert job.error is None
    count = await jobs.wait_for_job(await jobs.submit("probe", action="probe.count"), 30)
    assert count.result[0] == 1, "the refused call never reached the plugin"


async def test_before_start_is_asked_only_when_the_slot_is_free(jobs: JobQueue) -> None:
    asked = asyncio.Event()

    async def ask() -> bool:
        asked.set()
        return True

    first = await jobs.submit("probe", action="probe.polite")
    second = await jobs.submit("probe", action="probe.echo", before_start=ask)
    await running(jobs, first)
    assert not asked.is_set()
    await jobs.cancel(first)
    assert (await jobs.wait_for_job(second, 30)).status is JobStatus.COMPLETED
    assert asked.is_set()


async def test_a_waiting_job_is_cancelled_at_once(jobs: JobQueue) -> None:
    first = await jobs.submit("probe", action="probe.polite")
    second = await jobs.submit("probe", action="probe.echo")
    await running(jobs, first)
    assert await jobs.cancel(second)
    job = jobs.get_job(second)
    assert (job.status, job.started_at) == (JobStatus.CANCELLED, None)
    assert job.error is not None
    assert job.error.outcome_known
    assert jobs.get_job(first).status is JobStatus.RUNNING
    assert not await jobs.cancel(second), "it had ended"


async def test_a_job_is_cancelled_while_it_waits_to_be_allowed_and_frees_its_slot(jobs: JobQueue) -> None:
    asked = asyncio.Event()

    async def forever() -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    stuck = await jobs.submit("probe", action="probe.count", before_start=forever)
    early = await jobs.submit("probe", action="probe.echo")
    await asked.wait()
    assert await jobs.cancel(stuck)
    assert jobs.get_job(stuck).started_at is None
    assert (await jobs.wait_for_job(early, 30)).status is JobStatus.COMPLETED


async def test_a_job_cancelled_before_its_task_ran_frees_its_slot(jobs: JobQueue) -> None:
    job_id = await jobs.submit("probe", action="probe.echo")
    assert await jobs.cancel(job_id)
    assert (await jobs.wait_for_job(await jobs.submit("probe", action="probe.echo"), 30)).status == "completed"


@pytest.mark.parametrize(("action", "known"), [("probe.polite", True), ("probe.stubborn", False)])
async def test_a_running_job_is_cancelled_through_the_plugin_or_by_force(
    jobs: JobQueue, action: str, known: bool
) -> None:
    job_id = await jobs.submit("probe", action=action)
    await running(jobs, job_id)
    assert await jobs.cancel(job_id)
    job = jobs.get_job(job_id)
    assert job.status is JobStatus.CANCELLED
    assert job.error is not None
    assert job.error.outcome_known is known


async def test_cancelling_a_job_whose_plugin_is_being_unloaded_ends_with_the_unloading(
    jobs: JobQueue, probe: PluginManager
) -> None:
    job_id = await jobs.submit("probe", action="probe.stubborn")
    await running(jobs, job_id)
    unloading = asyncio.create_task(probe.unload_plugin_async("probe"))
    await asyncio.sleep(0)
    await jobs.cancel(job_id)
    await unloading
    job = jobs.get_job(job_id)
    assert job.error is not None
    assert (job.status, job.error.outcome_known) == (JobStatus.CANCELLED, False)


async def test_a_result_that_comes_after_the_cancel_request_is_kept(jobs: JobQueue) -> None:
    job_id = await jobs.submit("probe", action="probe.waits_for_callback")
    await running(jobs, job_id)
    assert await jobs.cancel(job_id)
    job = jobs.get_job(job_id)
    assert (job.status, job.result) == (JobStatus.CANCELLED, "finished all the same")
    assert job.error is not None
    assert job.error.outcome_known


async def test_an_error_of_the_plugin_and_the_death_of_its_worker_are_told_apart(
    jobs: JobQueue, probe: PluginManager
) -> None:
    refused = await jobs.wait_for_job(await jobs.submit("probe", action="probe.fail", how="input"), 30)
    assert refused.error is not None
    assert (refused.status, refused.error.outcome_known, refused.error.fields_invalid) == (
        JobStatus.FAILED,
        True,
        ("rows", "unit"),
    )
    job_id = await jobs.submit("probe", action="probe.stubborn")
    await running(jobs, job_id)
    pid = probe.get_instance("probe").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    died = await jobs.wait_for_job(job_id, 30)
    assert died.error is not None
    assert (died.error.plugin_name, died.error.plugin_instance_id) == ("probe", died.plugin_instance_id)
    assert (died.status, died.error.error_type, died.error.outcome_known) == (
        JobStatus.FAILED,
        "WorkerDiedError",
        False,
    )


async def test_events_are_replayed_to_those_who_come_late_and_end_with_the_job(jobs: JobQueue) -> None:
    job_id = await jobs.submit("probe", action="probe.report", steps=5)
    followed = [event async for event in jobs.events(job_id)]
    replayed = [event async for event in jobs.events(job_id)]
    for events in (followed, replayed):
        moves = [event.payload for event in events if event.type is JobEventType.STATE_TRANSITION]
        assert moves == [{"from": "pending", "to": "running"}, {"from": "running", "to": "completed"}]
        numbers = [event.number for event in events]
        assert numbers == sorted(set(numbers))
    assert [event async for event in jobs.events(job_id, after=followed[-2].number)] == followed[-1:]


async def test_following_from_a_number_that_was_never_reached_ends_with_the_job(jobs: JobQueue) -> None:
    job_id = await jobs.submit("probe", action="probe.echo")
    follower = asyncio.create_task(anext(jobs.events(job_id, after=999), None))
    await jobs.wait_for_job(job_id, 30)
    assert await follower is None


async def test_only_the_last_ended_jobs_are_remembered(probe: PluginManager) -> None:
    queue = JobQueue(probe, max_history=2)
    await queue.start()
    ended = [await queue.submit("probe", action="probe.echo", n=n) for n in range(3)]
    await queue.wait_for_job(ended[2], 30)
    with pytest.raises(ValueError, match="the last 2 are kept"):
        queue.get_job(ended[0])
    stats = queue.get_stats()
    assert (stats.total_completed, stats.total_pending) == (2, 0)


async def test_a_job_for_an_unknown_instance_is_refused_and_one_whose_instance_went_away_fails(
    probe: PluginManager,
) -> None:
    queue = JobQueue(probe)
    with pytest.raises(PluginNotLoadedError):
        await queue.submit("nobody")
    job_id = await queue.submit("probe", action="probe.echo")
    await probe.unload_plugin_async("probe")
    await queue.start()
    job = await queue.wait_for_job(job_id, 30)
    assert job.error is not None
    assert (job.status, job.error.error_type, job.started_at) == (JobStatus.FAILED, "PluginNotLoadedError", None)


async def test_stop_waits_then_cancels_and_pending_jobs_run_after_a_new_start(probe: PluginManager) -> None:
    queue = JobQueue(probe)
    await queue.start()
    first = await queue.submit("probe", action="probe.polite")
    second = await queue.submit("probe", action="probe.echo")
    await running(queue, first)
    await queue.stop(0.0)
    assert queue.get_job(first).status is JobStatus.CANCELLED
    assert queue.get_job(second).status is JobStatus.PENDING
    await queue.start()
    assert (await queue.wait_for_job(second, 30)).status is JobStatus.COMPLETED


async def test_the_callers_context_reaches_the_plugin(jobs: JobQueue) -> None:
    call = CallContext("c", "acme", "run-1", "step-1")
    job = await jobs.wait_for_job(await jobs.submit("probe", action="probe.context", call=call), 30)
    assert job.result == vars(call)


async def test_waiting_for_a_job_has_a_time_limit(jobs: JobQueue) -> None:
    job_id = await jobs.submit("probe", action="probe.polite")
    with pytest.raises(TimeoutError):
        await jobs.wait_for_job(job_id, 0.01)


async def test_a_tenants_running_job_holds_up_its_own_jobs_and_nobody_elses(jobs: JobQueue) -> None:
    first = await jobs.submit("probe", action="probe.polite", call=CallContext("first", "tenant-a"))
    await running(jobs, first)
    mine = await jobs.submit("probe", action="probe.echo", call=CallContext("mine", "tenant-a"))
    theirs = await jobs.submit("probe", action="probe.echo", call=CallContext("theirs", "tenant-b"))
    assert (await jobs.wait_for_job(theirs, 30)).status is JobStatus.COMPLETED
    assert jobs.get_job(mine).status is JobStatus.PENDING
    assert "the only slot" in str(jobs.get_job(mine).block_reason)
    await jobs.cancel(first)
    assert (await jobs.wait_for_job(mine, 30)).status is JobStatus.COMPLETED


async def test_jobs_of_a_stateless_plugin_share_its_slots_whoever_they_are_for(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(probe_meta("Keeper", "keeper", "keeper", stateless=True))
    queue = JobQueue(manager)
    await queue.start()
    first = await queue.submit("keeper", action="keeper.wait", call=CallContext("first", "tenant-a"))
    await running(queue, first)
    theirs = await queue.submit("keeper", action="keeper.pid", call=CallContext("theirs", "tenant-b"))
    assert "held by" in str(queue.get_job(theirs).block_reason)
    await queue.cancel(first)
    assert (await queue.wait_for_job(theirs, 30)).status is JobStatus.COMPLETED
    await queue.stop(0.0)
