"""Each process is killed, and stopped past the lease, at each hand-over of a step; nothing is lost or doubled.

Two runs are struck at a time: the middle step of one may be repeated, that of the other may not.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

# Where the middle step is struck: the crash point, and the how-many-th crossing after the first step's call began.
MOMENTS = {
    "before admit": ("admission.admit_as_assumed.before", 1),
    "between admit and begin": ("admission.begin.before", 1),
    "between begin and the first frame": ("admission.begin.after", 1),
    "while the plugin works": None,
    "between result and settle": ("admission.settle.before", 2),
    "after the commit of settle": ("admission.settle.after", 2),
    "while awaiting approval": None,
}
BEGUN = ("between begin and the first frame", "while the plugin works", "between result and settle")
FAULTS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
NODES = ("backend", "run worker")
PLUGINS = ("plugin worker", "supervisor")
VICTIMS = ("run worker", *PLUGINS, "PostgreSQL")
WHOLE = float(os.environ.get("SOAK", "0.05")) >= 1


def _cases(*victims: str) -> list[tuple[str, str, str]]:
    """Every victim, fault and moment; short of a soak every fourth of them, so that each is met."""
    return [
        (victim, fault, moment)
        for row, victim in enumerate(victims)
        for column, fault in enumerate(FAULTS)
        for place, moment in enumerate(MOMENTS)
        if WHOLE or (row + 2 * column + place) % 4 == 0
    ]


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, open_cluster: Callable[..., Any]) -> Iterator[Any]:
    """Backends with a run worker inside, or run workers beside an API."""
    with open_cluster(*request.param) as opened:
        yield opened
        opened.consistent()


@pytest.mark.parametrize("cluster", [("serve", "serve", "serve")], indirect=True, ids=["backends"])
@pytest.mark.parametrize(("victim", "fault", "moment"), _cases("backend"))
def test_a_struck_backend_loses_and_doubles_nothing(
    cluster: Any, victim: str, fault: str, moment: str, journal: Any
) -> None:
    _strike(cluster, victim, fault, moment, journal)


@pytest.mark.parametrize("cluster", [("api", "worker", "worker", "worker")], indirect=True, ids=["workers"])
@pytest.mark.parametrize(("victim", "fault", "moment"), _cases(*VICTIMS))
def test_a_struck_part_loses_and_doubles_nothing(
    cluster: Any, victim: str, fault: str, moment: str, journal: Any
) -> None:
    _strike(cluster, victim, fault, moment, journal)


def _strike(cluster: Any, victim: str, fault: str, moment: str, journal: Any) -> None:
    cluster.repair()
    journals = {kind: journal(kind) for kind in ("repeatable", "unrepeatable")}
    runs = {}
    for kind, folder in journals.items():
        folder.close("warm")
        runs[kind] = cluster.create(kind, key=f"{folder.folder}", journal=str(folder.folder))
    holders = _bring_to(cluster, moment, runs, journals)
    kept = {kind: _outcomes(cluster.run(run_id)) for kind, run_id in runs.items()}
    struck = _processes(cluster, victim, holders)
    with _struck(cluster, struck, FAULTS[fault]):
        if fault == "killed":
            if victim == "PostgreSQL":
                cluster.postgres.start()
            cluster.repair()
        elif victim not in NODES:
            cluster.points.release_all()
            past_the_lease = time.monotonic() + float(cluster.environment["PLM_LEASE_SECONDS"]) + 0.1
            cluster.until(lambda: time.monotonic() > past_the_lease, "the lease would have run out")
        elif moment == "while awaiting approval":
            for kind, run_id in runs.items():
                cluster.finish(run_id, journals[kind])
        else:
            away = {process.pid for process in struck}
            for run_id in runs.values():
                try:
                    cluster.until(
                        lambda run_id=run_id: cluster.holder(run_id) not in away, "another takes the run over"
                    )
                except AssertionError as error:
                    error.add_note(cluster.report())
                    raise
        for folder in journals.values():
            folder.open("act")
    cluster.points.release_all()

    for kind, run_id in runs.items():
        run, acted = cluster.finish(run_id, journals[kind])
        assert run["state"] == "succeeded", run
        assert run["result"]["label"] == "sign"
        assert journals[kind].effects() == Counter(warm=1, act=1, sign=1), run
        outcomes = _outcomes(run)
        assert outcomes.items() >= kept[kind].items(), "what was recorded stayed as it was"
        unknown = "outcome_unknown" in acted
        if kind == "repeatable" or moment not in BEGUN:
            assert not unknown, cluster.story(run_id)
        elif victim in NODES or (fault == "killed" and victim in PLUGINS and moment == "while the plugin works"):
            assert unknown, cluster.story(run_id)
    assert _calls(cluster, runs["repeatable"]) == 3


def _bring_to(cluster: Any, moment: str, runs: dict[str, str], journals: dict[str, Any]) -> set[int]:
    """Let both runs go on until this moment; answers the processes that hold them there."""
    for folder in journals.values():
        cluster.until(lambda folder=folder: folder.entered("warm"), "the first call begins")
        if moment == "while the plugin works":
            folder.close("act")
    place = MOMENTS[moment]
    traps = (
        [cluster.points.hold(place[0], run_id=run_id, occurrence=place[1]) for run_id in runs.values()] if place else []
    )
    for folder in journals.values():
        folder.open("warm")
    if traps:
        return {trap.reached() for trap in traps}
    if moment == "while the plugin works":
        for folder in journals.values():
            cluster.until(lambda folder=folder: folder.entered("act"), "the call begins")
    else:
        for run_id in runs.values():
            cluster.until(lambda run_id=run_id: _parked(cluster, run_id), f"run {run_id} is parked")
    return {cluster.holder(run_id) for run_id in runs.values()}


def _parked(cluster: Any, run_id: str) -> bool:
    """Whether it waits for its approval, to which nothing has stood in the way so far."""
    state = cluster.run(run_id)["state"]
    assert state in ("queued", "running", "awaiting_approval"), cluster.story(run_id)
    return bool(state == "awaiting_approval")


@contextmanager
def _struck(cluster: Any, processes: list[psutil.Process], number: int) -> Iterator[None]:
    """Send the signal, and let those go on at the end who were only stopped."""
    for process in processes:
        process.send_signal(number)
    if number == signal.SIGKILL:
        psutil.wait_procs(processes, timeout=30)
        yield
        return
    cluster.stopped = {process.pid for process in processes}
    try:
        yield
    finally:
        for process in reversed(processes):
            with suppress(psutil.NoSuchProcess):
                process.resume()
        cluster.stopped = set()


def _processes(cluster: Any, victim: str, holders: set[int]) -> list[psutil.Process]:
    hosts = [psutil.Process(pid) for pid in holders]
    supervisors = [child for host in hosts for child in host.children()]
    match victim:
        case "PostgreSQL":
            pid = int((cluster.postgres.cluster_dir / "postmaster.pid").read_text().splitlines()[0])
            postmaster = psutil.Process(pid)
            return [postmaster, *postmaster.children(recursive=True)]
        case "supervisor":
            assert supervisors
            return supervisors
        case "plugin worker":
            found = [worker for supervisor in supervisors for worker in supervisor.children()]
            assert found
            return found
        case _:
            return hosts


def _outcomes(run: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """What the recorded successes of a run are."""
    return {
        (step["step_id"], step["attempt"]): (step["output"], step["finished_at"])
        for step in run["steps"]
        if step["state"] == "succeeded"
    }


def _calls(cluster: Any, run_id: str) -> int:
    """What the run was charged for, in calls."""
    spent = "SELECT spent, reserved FROM budgets WHERE scope_kind = 'run' AND scope_id = %s AND unit = 'calls'"
    ((calls, reserved),) = cluster.query(spent, run_id)
    assert reserved == 0
    return int(calls)
