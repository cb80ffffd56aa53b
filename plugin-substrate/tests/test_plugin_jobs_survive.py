"""Jobs on disk outlive hosts that are killed outright."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_hosts import HostProcess, effects, plugin_folder, write_manifests
from plugin_substrate import JobStatus, LocalJobStore, PluginMeta
from plugin_substrate.queue.store import JobFilter

MetaFactory = Callable[..., PluginMeta]


@pytest.fixture
def folder(tmp_path: Path, probe_meta: MetaFactory) -> Path:
    """Where hosts find a plugin that must not be repeated, and one that may."""
    write_manifests(
        tmp_path, probe_meta("Jobber", "jobber", "plain"), probe_meta("Jobber", "jobber", "twice", idempotent=True)
    )
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], HostProcess]]:
    """Start hosts over the same folder, of which one at a time may live."""
    hosts: list[HostProcess] = []

    def make() -> HostProcess:
        hosts.append(HostProcess(folder))
        return hosts[-1]

    yield make
    for host in hosts:
        host.kill()


def gated(name: str) -> dict[str, Any]:
    return {"action": "job.gated", "name": name}


def let_go(folder: Path, plugin: str, name: str) -> None:
    (plugin_folder(folder, plugin) / f"go-{name}").touch()


def test_after_a_host_was_killed_nothing_is_lost_and_only_the_idempotent_is_repeated(
    folder: Path, start: Callable[[], HostProcess]
) -> None:
    host = start()
    done = host.ask("submit", instance="plain", kwargs={"action": "job.value", "value": [1, 2]})
    assert host.ask("wait", job_id=done) == "completed"
    events = host.ask("events", job_id=done)
    ran = {name: host.ask("submit", instance=name, kwargs=gated("first")) for name in ("plain", "twice")}
    waits = [
        host.ask("submit", instance="plain", kwargs=gated(name), priority=p) for name, p in (("low", 0), ("high", 1))
    ]
    for job_id in ran.values():
        host.ask("wait_until_at_work", job_id=job_id)
    host.kill()

    host = start()
    assert host.ask("show", job_id=done)["result"] == [1, 2]
    assert host.ask("events", job_id=done) == events
    interrupted = host.ask("show", job_id=ran["plain"])
    assert interrupted == {
        "status": "interrupted",
        "progress": 0.25,
        "result": None,
        "error": "WorkerDiedError",
        "retries": 0,
    }
    host.ask("wait_until_at_work", job_id=waits[1])
    assert host.ask("status", job_id=waits[0]) == "pending", "the higher priority went first"
    host.ask("wait_until_at_work", job_id=ran["twice"])
    for plugin, name in (("plain", "high"), ("plain", "low"), ("twice", "first")):
        let_go(folder, plugin, name)
    assert [host.ask("wait", job_id=job_id) for job_id in (*waits, ran["twice"])] == ["completed"] * 3
    assert host.ask("show", job_id=ran["twice"])["retries"] == 1
    told = host.ask("events", job_id=ran["twice"])
    assert [int(line.split()[0]) for line in told] == list(range(1, len(told) + 1)), "numbers go on without a gap"
    assert effects(folder, "plain") == ["first", "high", "low"]
    assert effects(folder, "twice") == ["first", "first"]


@pytest.mark.parametrize(
    ("plugin", "fail_fast", "expected"),
    [
        ("plain", True, ["failed", [False]]),
        ("plain", False, ["completed", [False, True]]),
        ("twice", True, ["completed", [True, True]]),
    ],
)
def test_a_sequence_goes_on_after_a_host_was_killed(
    folder: Path, start: Callable[[], HostProcess], plugin: str, fail_fast: bool, expected: list[Any]
) -> None:
    host = start()
    sequence_id = host.ask("sequence", instance=plugin, all_kwargs=[gated("one"), gated("two")], fail_fast=fail_fast)
    (job,) = LocalJobStore(folder / "jobs.db").jobs(JobFilter(), 10)
    host.ask("wait_until_at_work", job_id=job.id)
    host.kill()
    for name in ("one", "two"):
        let_go(folder, plugin, name)
    assert start().ask("wait_for_sequence", sequence_id=sequence_id) == expected


def test_a_job_under_which_hosts_keep_dying_is_given_up(start: Callable[[], HostProcess]) -> None:
    host = start()
    job_id = host.ask("submit", instance="twice", kwargs=gated("poison"))
    for _ in range(4):
        host.ask("wait_until_at_work", job_id=job_id)
        host.kill()
        host = start()
    assert host.ask("status", job_id=job_id) == "interrupted"


def test_a_cancel_that_the_host_did_not_live_to_see_through_is_not_undone(
    folder: Path, start: Callable[[], HostProcess]
) -> None:
    host = start()
    ended = host.ask("submit", instance="twice", kwargs=gated("one"))
    host.ask("wait_until_at_work", job_id=ended)
    assert host.ask("cancel", job_id=ended)
    host.kill()
    store = LocalJobStore(folder / "jobs.db")
    kept = store.job(ended)
    assert kept is not None
    assert kept.job.status is JobStatus.CANCELLED
    assert start().ask("status", job_id=ended) == "cancelled"
