from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from plugin_substrate import PluginMeta, write_manifest

DOOMED_HOST = Path(__file__).parent / "plugins" / "doomed_host.py"


@pytest.mark.parametrize("complication", ["none", "stopped supervisor", "forked host"])
def test_a_host_killed_outright_takes_every_process_of_its_plugins_along(
    tmp_path: Path, probe_meta: Callable[..., PluginMeta], complication: str
) -> None:
    """One worker is busy in C code, one asleep, one stopped; a grandchild has a session of its own."""
    manifest = tmp_path / "probe.json"
    write_manifest(manifest, probe_meta().manifest)
    command = [sys.executable, str(DOOMED_HOST), str(manifest), str(tmp_path / "data"), complication]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        pids = json.loads(host.stdout.readline())
        descriptors = [os.pidfd_open(pid) for pid in pids]
        host.kill()
        assert len(pids) == 5
        wait_for_the_end(descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


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
