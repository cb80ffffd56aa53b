"""Who goes first, without a plugin, a clock or a loop."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import JobRequest, MachineResources, ResourceRequirements, RetryPolicy
from plugin_substrate.errors import JobError, PluginInputError, PluginTransientError
from plugin_substrate.queue.resources import Demand, Ledger, demand_of
from plugin_substrate.queue.waiting import WaitingJobs

MACHINE = MachineResources(cpu_slots=4, memory_mb=100, tokens={"seat": 2})
NOTHING = Demand()


class Line:
    """Jobs in the order of their submission, a second apart."""

    def __init__(self, *, slots: int = 1, patience: float = 30.0, ageing: float = 60.0) -> None:
        self.ledger = Ledger(MACHINE)
        self.waiting = WaitingJobs(self.ledger, lambda _: slots, patience=patience)
        self.ageing = ageing
        self.now = 0.0
        self.lanes: dict[str, tuple[str, str]] = {}

    def submit(
        self, job_id: str, lane: str = "a", owner: str = "", priority: int = 0, demand: Demand = NOTHING
    ) -> None:
        self.now += 1
        self.lanes[job_id] = (lane, "")
        self.waiting.add(job_id, (lane, ""), owner, (self.now - priority * self.ageing, len(self.lanes)), demand)

    def start(self) -> list[str]:
        return list(self.waiting.start_any(self.now))

    def end(self, job_id: str, seconds: float = 1.0) -> list[str]:
        self.now += seconds
        lane = self.waiting.end(job_id, seconds)
        return list(self.waiting.start_next(lane, self.now))


def test_owners_take_turns_whoever_came_first_and_with_how_many() -> None:
    line = Line()
    for number in range(6):
        line.submit(f"many-{number}", owner="many")
    line.submit("few-0", owner="few")
    line.submit("few-1", owner="few")
    order = line.start()
    while following := line.end(order[-1]):
        order += following
    assert order[:5] == ["many-0", "few-0", "many-1", "few-1", "many-2"]


def test_an_owner_who_was_away_is_not_owed_the_time() -> None:
    line = Line()
    for number in range(50):
        line.submit(f"busy-{number}", owner="busy")
    (running,) = line.start()
    for _ in range(20):
        (running,) = line.end(running)
    for number in range(10):
        line.submit(f"late-{number}", owner="late")
    seen = []
    for _ in range(10):
        (running,) = line.end(running)
        seen.append(running.partition("-")[0])
    assert Counter(seen) == {"late": 5, "busy": 5}


def test_priority_is_worth_waiting_time_so_nothing_waits_for_ever() -> None:
    line = Line(ageing=10.0)
    line.submit("first")
    line.submit("old", priority=0)
    (running,) = line.start()
    order = []
    for number in range(30):
        line.submit(f"new-{number}", priority=1)
        (running,) = line.end(running)
        order.append(running)
        if running == "old":
            break
    assert order[0] == "new-0", "the higher priority goes first"
    assert order[-1] == "old"


def test_a_large_job_is_not_passed_by_small_ones_for_ever() -> None:
    small, large = Demand(per_job={"cpu_slots": 1}), Demand(per_job={"cpu_slots": 4})
    line = Line(slots=9, patience=10.0)
    for number in range(4):
        line.submit(f"small-{number}", lane="small", demand=small)
    running = line.start()
    line.submit("large", lane="large", demand=large)
    passed = 0
    for number in range(4, 100):
        line.submit(f"small-{number}", lane="small", demand=small)
        running += line.end(running.pop(0))
        if "large" in running:
            break
        passed += 1
    assert running == ["large"], "it has the machine to itself"
    assert 3 < passed < 20, "at first small ones went on, then the machine was kept free for it"


def test_what_a_worker_takes_counts_once_and_what_a_job_takes_each_time() -> None:
    demand = Demand(per_job={"token:seat": 1}, per_worker={"memory_mb": 60})
    line = Line(slots=9)
    for number in range(3):
        line.submit(f"a{number}", lane="a", demand=demand)
    line.submit("b0", lane="b", demand=demand)
    assert line.start() == ["a0", "a1"], "two seats, one worker"
    reasons = {job_id: line.waiting.why(job_id) for job_id in ("a2", "b0")}
    assert (reasons["a2"].resource, reasons["a2"].available) == ("token:seat", 0)
    assert reasons["a2"].holders == ("a0", "a1")
    assert line.end("a0") == ["a2"]
    assert line.end("a1") == []
    assert line.waiting.why("b0").resource == "memory_mb"
    assert line.end("a2") == ["b0"]


@pytest.mark.parametrize("how", ["cancelled", "reordered"])
def test_what_waits_no_longer_takes_no_memory_also_behind_one_that_never_starts(how: str) -> None:
    line = Line(slots=0)
    line.submit("first", priority=9)

    def go_on(count: int) -> int:
        for _ in range(count):
            if how == "cancelled":
                line.submit("other")
                assert line.waiting.remove("other")
                assert line.start() == []
            else:
                line.now += 1
                line.waiting.reorder("first", (line.now, 1))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = go_on(200)
        assert go_on(5000) - before < 5000 * 20
    finally:
        tracemalloc.stop()


def test_how_many_go_first_is_said() -> None:
    line = Line()
    for name, priority in (("run", 0), ("low", 0), ("high", 1)):
        line.submit(name, priority=priority)
    assert line.start() == ["high"]
    assert line.waiting.why("low").jobs_ahead == 1
    assert "1 job goes first" in line.waiting.why("low").text


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from("xyz"),
            st.integers(-2, 2),
            st.sampled_from(
                [{}, {"cpu_slots": 1}, {"cpu_slots": 4}, {"min_system_ram_mb": 70}, {"tokens": {"seat": 1}}]
            ),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_whatever_is_submitted_runs_once_and_never_takes_more_than_there_is(jobs: list[tuple[Any, ...]]) -> None:
    line = Line(slots=2)
    demands = {lane: demand_of(ResourceRequirements(**needs)) for lane, _, _, needs, _ in jobs}
    started: list[str] = []
    running: list[str] = []
    for number, (lane, owner, priority, _, end) in enumerate(jobs):
        line.submit(f"{number}", lane, owner, priority, demands[lane])
        running += line.start()
        if end and running:
            started.append(running.pop(0))
            running += line.end(started[-1])
        used = Counter(line.lanes[job_id][0] for job_id in running)
        assert all(count <= 2 for count in used.values())
        assert sum(demands[lane].per_job.get("cpu_slots", 0) * count for lane, count in used.items()) <= 4
        assert sum(demands[lane].per_job.get("token:seat", 0) * count for lane, count in used.items()) <= 2
        assert sum(demands[lane].per_worker.get("memory_mb", 0) for lane in used) <= 100
    while running:
        started.append(running.pop(0))
        running += line.end(started[-1])
    assert sorted(started, key=int) == [str(number) for number in range(len(jobs))]


@given(st.integers(0, 200), st.one_of(st.none(), st.floats(0, 400)))
def test_a_pause_grows_within_its_bounds_and_is_never_shorter_than_told(count: int, told: float | None) -> None:
    policy = RetryPolicy(max_attempts=10**6, base_seconds=1, max_seconds=300)
    error = JobError.from_exception(PluginTransientError("later", retry_after_seconds=told))
    pause = policy.pause(error, count, idempotent=False)
    if told is not None and told > 300:
        assert pause is None
    else:
        assert pause is not None
        assert max(told or 0, min(300, 2.0 ** min(count, 60)) / 2) <= pause <= 300


@pytest.mark.parametrize("told", [float("nan"), float("inf"), -5, "soon", True, [1]])
def test_advice_that_makes_no_sense_is_not_heard(told: Any) -> None:
    error = replace(JobError.from_exception(PluginTransientError("later")), retry_after_seconds=told)
    pause = RetryPolicy(base_seconds=0, max_seconds=1).pause(error, 0, idempotent=False)
    assert pause is not None
    assert 0 <= pause <= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 10**30),
        ("priority", float("nan")),
        ("priority", 1.5),
        ("priority", "7"),
        ("priority", None),
        ("owner", "a\ud800"),
        ("owner", "a" * 257),
        ("owner", 5),
        ("owner", None),
        ("owner", "a\nb"),
        ("deadline_seconds", 0),
        ("deadline_seconds", float("nan")),
        ("deadline_seconds", "soon"),
        ("no_progress_seconds", float("inf")),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        JobRequest(plugin_instance_id="probe", **{field: value})


def test_what_nobody_knows_the_outcome_of_is_repeated_only_where_that_does_no_harm() -> None:
    policy = RetryPolicy()
    unknown = JobError.from_exception(PluginTransientError("lost", outcome_known=False))
    assert policy.pause(unknown, 0, idempotent=False) is None
    assert policy.pause(unknown, 0, idempotent=True) is not None
    assert policy.pause(JobError.from_exception(PluginInputError("wrong")), 0, idempotent=True) is None
    for wrong in ({"max_attempts": 0}, {"base_seconds": -1}, {"base_seconds": 9, "max_seconds": 1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            RetryPolicy(**wrong)  # type: ignore[arg-type]
