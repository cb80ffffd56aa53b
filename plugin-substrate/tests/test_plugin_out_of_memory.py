"""A worker that the kernel ends for want of memory is told from one that somebody killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import PluginManager, WorkerDiedError, WorkerOOMError
from plugin_substrate.deaths import WorkerExit, death_of
from plugin_substrate.errors import PluginError, ProtocolError
from plugin_substrate.kernel_kills import oom_kills

MB = 1 << 20
GROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def keep_small() -> Iterator[Callable[[int], None]]:
    """Put a process into a control group of 96 MB, of either version; where that may not be made there is none."""
    for parent, limit in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")):
        group = parent / f"plugin-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(96 * MB))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        yield lambda pid, group=group: (group / "cgroup.procs").write_text(str(pid))  # type: ignore[misc]
        group.rmdir()
        return
    pytest.skip("no control group for memory can be made here; see the tests below for what is made of its end")


async def test_a_worker_that_the_kernel_ends_is_an_oom_with_an_unknown_outcome_and_the_next_call_finds_another(
    manager: PluginManager, probe_meta: Any, keep_small: Callable[[int], None]
) -> None:
    instance = await manager.load_plugin_async(probe_meta("Eater", "eater", "eater"))
    assert instance.pid is not None
    keep_small(instance.pid)
    with pytest.raises(WorkerOOMError, match="want of memory") as caught:
        await manager.execute_plugin_async("eater", action="eater.keep", mb=400)
    assert (caught.value.process_returncode, caught.value.outcome_known) == (-signal.SIGKILL, False)
    assert await manager.execute_plugin_async("eater", action="eater.keep", mb=1) != instance.pid


async def test_a_worker_that_somebody_kills_is_no_oom(probe: PluginManager) -> None:
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        await probe.execute_plugin_async("probe", action="probe.die", number=int(signal.SIGKILL))


def test_the_kernel_counts() -> None:
    assert oom_kills() >= 0


@pytest.mark.parametrize(
    ("ended", "broken", "kind"),
    [
        (WorkerExit(-signal.SIGKILL, by_kernel=True), None, WorkerOOMError),
        (WorkerExit(-signal.SIGKILL), None, WorkerDiedError),
        (WorkerExit(-signal.SIGSEGV, by_kernel=True), None, WorkerDiedError),
        (WorkerExit(1, by_kernel=True), None, WorkerDiedError),
        (WorkerExit(None, by_kernel=True), None, WorkerDiedError),
        (WorkerExit(-signal.SIGKILL, by_kernel=True), ProtocolError("nonsense"), WorkerDiedError),
    ],
)
def test_only_a_kill_by_nobody_here_in_the_time_of_a_shortage_is_an_oom(
    ended: WorkerExit, broken: ProtocolError | None, kind: type[PluginError]
) -> None:
    death = death_of(ended, broken, ["last words"])
    assert type(death) is kind
    assert (death.outcome_known, getattr(death, "log_tail", ())) == (False, ("last words",))
