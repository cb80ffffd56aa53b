from __future__ import annotations

from pathlib import Path

from plugin_substrate.testing import ConfinementProbe, PluginWorkers, attempt
from plugin_substrate.worker.reach import limit_files


def test_a_worker_may_read_the_limits_of_its_own_control_groups_and_nothing_else_of_them(
    plugin_workers: PluginWorkers,
) -> None:
    """DuckDB, joblib and many others look there, and fail where they see a file that they cannot open."""
    probe = plugin_workers.start(ConfinementProbe)
    limits = [Path(path) for path in limit_files(Path("/proc/self/cgroup").read_text(encoding="utf-8"))]
    there = [path for path in limits if path.exists()]
    outcomes = [attempt(probe, "read", path=str(path)) for path in there]
    assert all(outcome.done for outcome in outcomes), outcomes
    if any(layer.startswith("landlock") for layer in probe.instance.layers):
        refusals = {"EACCES", "ENOENT"} if "bubblewrap" in probe.instance.layers else {"EACCES"}
        assert attempt(probe, "list", path="/sys/fs/cgroup").error == "EACCES"
        members = [path.with_name("cgroup.procs") for path in there]
        assert {attempt(probe, "read", path=str(path)).error for path in members if path.exists()} <= refusals


def test_the_limits_of_every_layout_of_control_groups_are_found() -> None:
    assert limit_files("") == limit_files("0::/../other") == limit_files("3:pids:/x") == ()
    assert limit_files("0::/a\n") == (
        *(f"/sys/fs/cgroup/a/{name}" for name in ("cpu.max", "memory.max", "memory.high")),
        *(f"/sys/fs/cgroup/{name}" for name in ("cpu.max", "memory.max", "memory.high")),
    )
    assert limit_files("4:memory:/a:b") == (
        "/sys/fs/cgroup/memory/a:b/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    )
    assert limit_files("2:cpu,cpuacct:/")[0] == "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"
