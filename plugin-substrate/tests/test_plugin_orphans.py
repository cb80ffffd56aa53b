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
from plugin_substrate import PluginManager, PluginMeta, write_manifest
from plugin_substrate.sweep import new_mark, put_mark, sweep_dead_hosts
from plugin_substrate.testing.leftovers import descendants
from plugin_substrate.worker import namespaces

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
        "stopped supervisor",
        "stopped supervisor, no namespaces",
        "forked host",
        "no namespaces, bare",
    ],
)
def test_a_host_killed_outright_takes_every_process_of_its_plugins_along(
    doomed: Callable[[str], DoomedHost], complication: str
) -> None:
    """One worker is busy in C code, one asleep, one stopped; a grandchild has a session of its own."""
    host = doomed(complication)
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
    host = doomed(f"no namespaces, {daemon}")
    assert "pid_namespace" not in host.layers
    assert "descendants_swept" in host.layers, "and the record says so"
    signal.pidfd_send_signal(host.supervisor, signal.SIGKILL)
    wait_for_the_end(host.descriptors)


async def test_what_a_dead_host_and_its_dead_supervisor_left_is_swept_by_the_next_host(
    doomed: Callable[[str], DoomedHost], manager: PluginManager, probe_meta: Callable[..., PluginMeta]
) -> None:
    host = doomed("stopped supervisor, no namespaces")
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
