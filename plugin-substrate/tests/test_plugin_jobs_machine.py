"""Whatever is done to a queue, a host and its workers, every job is where a small model says it is."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from job_hosts import HostProcess, effects, plugin_folder, write_manifests
from plugin_substrate import JobStatus, LocalJobStore, PluginMeta
from plugin_substrate.queue.store import JobFilter

SOAK = float(os.environ.get("SOAK", "0.05"))
STEPS = 50 if SOAK >= 1 else 20
EXAMPLES = 60 if SOAK >= 1 else max(2, int(20 * SOAK))
JOBS = 50_000 if SOAK >= 1 else max(500, int(10_000 * SOAK))

PLUGINS = st.sampled_from(["plain", "twice"])
PICK = st.integers(min_value=0, max_value=10**6)


@dataclass
class Expected:
    """A job as the model sees it."""

    plugin: str
    name: str
    priority: int
    order: int
    status: str = "pending"
    recoveries: int = 0
    runs: int = 0


class Queue(RuleBasedStateMachine):
    """One slot for each plugin, and jobs that go on until they are let go."""

    metas: tuple[PluginMeta, ...]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="jobs-"))
        write_manifests(self.folder, *self.metas)
        self.jobs: dict[str, Expected] = {}
        self.enabled = {"plain": True, "twice": True}
        self.host = HostProcess(self.folder)

    def teardown(self) -> None:
        self.host.kill()
        shutil.rmtree(self.folder)

    # -- what is done

    @initialize()
    def begin(self) -> None:
        """Start with something to do."""
        for plugin in ("plain", "twice"):
            self.submit(plugin, 0)

    @rule(plugin=PLUGINS, priority=st.integers(min_value=-2, max_value=2))
    def submit(self, plugin: str, priority: int) -> None:
        name = f"job-{len(self.jobs)}"
        job_id = self.host.ask(
            "submit", instance=plugin, kwargs={"action": "job.gated", "name": name}, priority=priority
        )
        assert bool(job_id) is self.enabled[plugin], "a disabled plugin takes no jobs"
        if job_id:
            self.jobs[job_id] = Expected(plugin, name, priority, len(self.jobs))
            self.settle()

    @precondition(lambda self: self.of("running"))
    @rule(pick=PICK)
    def let_go(self, pick: int) -> None:
        job_id = self.picked(pick, "running")
        job = self.jobs[job_id]
        (plugin_folder(self.folder, job.plugin) / f"go-{job.name}").touch()
        self.host.ask("wait", job_id=job_id)
        job.status = "completed"
        self.settle()

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        job_id = self.picked(pick, *JobStatus)
        job = self.jobs[job_id]
        lives = job.status in ("pending", "running")
        assert self.host.ask("cancel", job_id=job_id) is lives
        if lives:
            job.status = "cancelled"
            self.settle()

    @precondition(lambda self: self.jobs)
    @rule(pick=PICK, priority=st.integers(min_value=-2, max_value=2))
    def reorder(self, pick: int, priority: int) -> None:
        job_id = self.picked(pick, *JobStatus)
        job = self.jobs[job_id]
        assert self.host.ask("reorder", job_id=job_id, priority=priority) is (job.status == "pending")
        if job.status == "pending":
            job.priority = priority

    @rule(plugin=PLUGINS)
    def kill_worker(self, plugin: str) -> None:
        self.host.ask("kill_worker", instance=plugin)
        for job_id, job in self.jobs.items():
            if job.plugin == plugin and job.status == "running":
                self.host.ask("wait", job_id=job_id)
                job.status = "failed"
        self.settle()

    @rule(plugin=PLUGINS)
    def evict(self, plugin: str) -> None:
        """Idle workers go; whatever runs is left alone."""
        self.host.ask("evict", instance=plugin)

    @rule(plugin=PLUGINS, enabled=st.booleans())
    def switch(self, plugin: str, enabled: bool) -> None:
        self.host.ask("switch", instance=plugin, enabled=enabled)
        self.enabled[plugin] = enabled
        self.settle()

    @rule()
    def kill_host(self) -> None:
        self.host.kill()
        for job in self.jobs.values():
            if job.status == "running":
                job.recoveries += 1
                again = job.plugin == "twice" and job.recoveries <= 3
                job.status = "pending" if again else "interrupted"
        self.host = HostProcess(self.folder)
        self.settle()

    @rule()
    def restart(self) -> None:
        """End the host in good order: what runs is cancelled, what waits waits."""
        self.host.stop()
        for job in self.jobs.values():
            if job.status == "running":
                job.status = "cancelled"
        self.host = HostProcess(self.folder)
        self.settle()

    # -- what must be

    @invariant()
    def every_job_is_where_it_should_be(self) -> None:
        found = {job_id: self.host.ask("status", job_id=job_id) for job_id in self.jobs}
        assert found == {job_id: job.status for job_id, job in self.jobs.items()}

    @invariant()
    def every_effect_happened_as_often_as_it_should(self) -> None:
        for plugin in ("plain", "twice"):
            expected = {job.name: job.runs for job in self.jobs.values() if job.plugin == plugin and job.runs}
            assert Counter(effects(self.folder, plugin)) == expected

    def settle(self) -> None:
        """Work out who runs next, and wait until it does."""
        for plugin, enabled in self.enabled.items():
            mine = {job_id: job for job_id, job in self.jobs.items() if job.plugin == plugin}
            if any(job.status == "running" for job in mine.values()):
                continue
            waiting = sorted(
                (job_id for job_id, job in mine.items() if job.status == "pending"),
                key=lambda job_id: (-self.jobs[job_id].priority, self.jobs[job_id].order),
            )
            for job_id in waiting if not enabled else waiting[:1]:
                if enabled:
                    self.host.ask("wait_until_at_work", job_id=job_id)
                    self.jobs[job_id].status = "running"
                    self.jobs[job_id].runs += 1
                else:
                    self.host.ask("wait", job_id=job_id)
                    self.jobs[job_id].status = "failed"

    def of(self, *statuses: str) -> list[str]:
        return [job_id for job_id, job in self.jobs.items() if job.status in statuses]

    def picked(self, pick: int, *statuses: str) -> str:
        some = self.of(*statuses)
        return some[pick % len(some)]


@pytest.fixture
def metas(probe_meta: Callable[..., PluginMeta]) -> tuple[PluginMeta, ...]:
    """A plugin that must not be repeated, and one that may."""
    return probe_meta("Jobber", "jobber", "plain"), probe_meta("Jobber", "jobber", "twice", idempotent=True)


@pytest.mark.timeout(3600)
def test_a_queue_agrees_with_its_model(metas: tuple[PluginMeta, ...]) -> None:
    machine = type("QueueOfProbes", (Queue,), {"metas": metas})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


@pytest.mark.timeout(7200)
def test_no_job_is_lost_and_none_repeated_that_must_not_be_however_often_hosts_and_workers_are_killed(
    metas: tuple[PluginMeta, ...], tmp_path: Path
) -> None:
    write_manifests(tmp_path, *metas)
    dice = random.Random(20240501)
    kept: list[str] = []
    kills: Counter[str] = Counter()
    faults = itertools.cycle(["host", "worker", "nothing", "worker"])
    host = HostProcess(tmp_path)
    while len(kept) < JOBS:
        count = dice.randint(1, max(100, JOBS // 50))
        host.ask("flood", instance=dice.choice(["plain", "twice"]), count=count)
        host.hear_until(dice.randint(0, count))
        what = next(faults)
        kills[what] += 1
        if what == "worker":
            host.ask("kill_worker", instance=dice.choice(["plain", "twice"]))
        elif what == "host":
            host.kill()
            kept += host.kept
            host = HostProcess(tmp_path)
        else:
            host.hear_until(len(host.kept))
        kept += host.kept
        host.kept = []
    host.ask("drain")
    kept += host.kept
    host.stop()
    assert min(kills.values()) > 0
    ended = check_what_became_of_them(tmp_path, kept)
    print(f"{len(kept)} jobs, killed: {kills['host']} hosts, {kills['worker']} workers; {dict(ended)}")  # noqa: T201


def check_what_became_of_them(folder: Path, kept: list[str]) -> Counter[str]:
    """Return how many ended how."""
    store = LocalJobStore(folder / "jobs.db")
    jobs = {job.id: job for job in store.jobs(JobFilter(), 10**6)}
    assert set(kept) <= set(jobs), "what was confirmed is there"
    assert all(job.status.terminal for job in jobs.values())
    for plugin in ("plain", "twice"):
        done = Counter(effects(folder, plugin))
        for job in (job for job in jobs.values() if job.plugin_instance_id == plugin):
            if job.status is JobStatus.COMPLETED:
                assert done[job.id] == 1 if plugin == "plain" else done[job.id] >= 1
            else:
                assert job.status in (JobStatus.INTERRUPTED, JobStatus.FAILED)
                assert job.error is not None
                assert job.error.error_type == "WorkerDiedError"
                assert plugin == "twice" or done[job.id] <= 1
            assert job.retry_count == 0 or plugin == "twice"
            if plugin == "twice" and job.status is JobStatus.INTERRUPTED:
                assert job.retry_count == 3, "it is given up only after three hosts died under it"
    return Counter(job.status.value for job in jobs.values())
