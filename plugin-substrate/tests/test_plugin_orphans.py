from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from plugin_substrate import PluginManager, PluginMeta, control_group, write_manifest
from plugin_substrate.sweep import new_mark, put_mark, sweep_dead_hosts
from plugin_substrate.testing.leftovers import descendants
from plugin_substrate.worker import namespaces


@pytest.fixture(autouse=True)
def bubblewrap(with_and_without_bubblewrap: bool) -> bool:
    """Whether bubblewrap is there: what has to end ends with it and without it."""
    return with_and_without_bubblewrap


DOOMED_HOST = Path(__file__).parent / "plugins" / "doomed_host.py"


class DoomedHost:
    """A host with three workers and a daemon of one of them, in a process of its own; and descriptors of them all."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        self.process = process
        self.layers: list[str] = told["layers"]
        self.descriptors = [os.pidfd_open(pid) for pid in told["pids"]]
        assert len(self.descriptors) == 5
        self.supervisor = self.descriptors[3]


@pytest.fixture
def doomed(tmp_path: Path, probe_meta: Callable[..., PluginMeta]) -> Iterator[Callable[[str], DoomedHost]]:
    """Start such a host under a complication."""
    manifest = tmp_path / "probe.json"
    write_manifest(manifest, probe_meta().manifest)
    hosts: list[DoomedHost] = []

    def start(complication: str) -> DoomedHost:
        command = [sys.executable, str(DOOMED_HOST), str(manifest), str(tmp_path / "data"), complication]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hosts.append(DoomedHost(process))
        return hosts[-1]

    yield start
    for host in hosts:
        for descriptor in host.descriptors:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        host.process.kill()
        host.process.communicate()


@pytest.mark.parametrize(
    "complication",
    [
        "none",
        "no namespaces",
        "no namespaces, no groups",
        "stopped supervisor",
        "stopped supervisor, no namespaces, no groups",
        "forked host",
        "no namespaces, no groups, bare",
    ],
)
def test_a_host_killed_outright_takes_every_process_of_its_plugins_along(
    doomed: Callable[[str], DoomedHost], complication: str, bubblewrap: bool
) -> None:
    """One worker is busy in C code, one asleep, one stopped; a grandchild has a session of its own."""
    host = doomed(complication)
    assert ("bubblewrap" in host.layers) is bubblewrap
    host.process.kill()
    wait_for_the_end(host.descriptors)


@pytest.mark.skipif(not namespaces.available(), reason="this system lets nobody make a process id namespace")
def test_a_killed_supervisor_takes_all_along_where_there_are_namespaces(doomed: Callable[[str], DoomedHost]) -> None:
    host = doomed("none")
    assert "pid_namespace" in host.layers
    signal.pidfd_send_signal(host.supervisor, signal.SIGKILL)
    wait_for_the_end(host.descriptors)


@pytest.mark.parametrize("daemon", ["a program", "bare"])
def test_what_a_killed_supervisor_leaves_behind_without_namespaces_is_swept(
    doomed: Callable[[str], DoomedHost], daemon: str
) -> None:
    """The bare one gave up its session, its parent and its environment, and tried to give up its mark."""
    host = doomed(f"no namespaces, no groups, {daemon}")
    assert not {"pid_namespace", "cgroup"} & set(host.layers)
    assert "descendants_swept" in host.layers, "and the record says so"
    signal.pidfd_send_signal(host.supervisor, signal.SIGKILL)
    wait_for_the_end(host.descriptors)


in_groups = pytest.mark.skipif(not control_group.usable(), reason="we may make no control group here")


@in_groups
@pytest.mark.parametrize("daemon", ["a program", "bare"])
def test_what_a_killed_supervisor_leaves_behind_ends_with_its_control_group(
    doomed: Callable[[str], DoomedHost], daemon: str
) -> None:
    """Without the sweep, so that only the group can have ended them; and nothing is left of the group."""
    host = doomed(f"no namespaces, no sweep, {daemon}")
    assert "cgroup" in host.layers
    assert not {"pid_namespace", "descendants_swept"} & set(host.layers)
    (group,) = groups_of(host.process.pid)
    signal.pidfd_send_signal(host.supervisor, signal.SIGKILL)
    wait_for_the_end(host.descriptors)
    wait_until(lambda: not group.exists())


@in_groups
async def test_a_group_goes_with_its_supervisor(manager: PluginManager, probe_meta: Callable[..., PluginMeta]) -> None:
    await manager.load_plugin_async(probe_meta())
    assert groups_of(os.getpid()) == [], "who may have no processes leaves none"
    await manager.load_plugin_async(probe_meta(name="forks", granted={"processes": 1}))
    assert len(groups_of(os.getpid())) == 1
    await manager.unload_all_async()
    assert groups_of(os.getpid()) == []


def groups_of(host: int) -> list[Path]:
    """Return the groups of a host, whose number its marks hold; other hosts of this machine have groups too."""
    parent = control_group.parent_folder()
    found = parent.glob("plugin-substrate-*-*") if parent else ()
    return [group for group in found if int(group.name.rpartition("-")[2]) >> 34 & (1 << 22) - 1 == host]


@pytest.mark.parametrize("means", ["no groups", pytest.param("in groups", marks=in_groups)])
async def test_what_a_dead_host_and_its_dead_supervisor_left_is_swept_by_the_next_host(
    doomed: Callable[[str], DoomedHost], manager: PluginManager, probe_meta: Callable[..., PluginMeta], means: str
) -> None:
    host = doomed(f"stopped supervisor, no namespaces, {means}")
    host.process.send_signal(signal.SIGSTOP)
    signal.pidfd_send_signal(host.supervisor, signal.SIGKILL)
    wait_for_the_end([host.supervisor])
    host.process.kill()
    wait_for_the_end(host.descriptors[:3])
    daemon = host.descriptors[4]  # which lives, unless another host of this machine has swept it already
    await manager.load_plugin_async(probe_meta(granted={"processes": 1}))
    wait_for_the_end([daemon])


DEAD_HOST = new_mark() ^ 1 << 20  # of another process, which had our number before us


def test_a_stranger_is_never_swept() -> None:
    """A mark alone is not enough: what may gain privileges was not below a supervisor."""
    stranger = subprocess.Popen(["sleep", "1000"])
    put_mark(stranger.pid, DEAD_HOST)
    try:
        sweep_dead_hosts()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_lives_in_a_container_is_not_taken_for_what_a_dead_host_left() -> None:
    """There the host that a mark names is alive under a number that means nobody here."""
    command = ["unshare", "--user", "--pid", "--fork", "setpriv", "--no-new-privs", "sleep", "1000"]
    container = subprocess.Popen(command)
    put_mark(container.pid, DEAD_HOST)
    try:
        inside, pid = inside_of(container)
        put_mark(pid, DEAD_HOST)  # it may have been there before its parent was marked
        sweep_dead_hosts()
        assert not ended(inside)
    finally:
        signal.pidfd_send_signal(inside, signal.SIGKILL)
        os.close(inside)
        container.kill()
        container.wait()


def inside_of(container: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Return a descriptor and the pid of what a container runs, once it runs with no new privileges."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for process in descendants(container.pid):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "Name:\tsleep\n" in status and "NoNewPrivs:\t1\n" in status:
                return os.pidfd_open(process.pid), process.pid
        time.sleep(0.005)
    raise AssertionError("nothing came up")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ended(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def wait_for_the_end(descriptors: list[int]) -> None:
    waiting = set(descriptors)
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    while waiting:
        ended = poll.poll(10_000)
        assert ended, f"{len(waiting)} of {len(descriptors)} are still there"
        for descriptor, _ in ended:
            poll.unregister(descriptor)
            waiting.discard(descriptor)
