"""What a pass of file plugins over a folder costs: the whole pass, one plugin more, the copy of a large tree, and a
pass that is large in every way: how long it holds up the event loop, and what memory and processor time it takes.

Everything is real: the supervisor, confined workers, the copy, the comparison and the way back. The baselines are what
the same plugin code takes in this process, without any isolation; ``cp -r`` of the same tree; and for the bytes alone
one file of the same size. No copy is removed before the last one is measured: an ext4 without a journal hands out no
inode that was freed a short while ago and searches past all of them for every new file. A pass keeps its copies apart
from such places; what is compared with it, and other programs, do not. BENCH_ROUNDS scales it.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from figures import Figure, command_line, report
from plugin_substrate.passes import PassLimits, PluginContext, PluginHost, PluginRegistry, ProtectedPaths
from plugin_substrate.passes.workspace import Workspace

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "20"))
FILES = 10
PLUGINS = 5
TREE_FILES, TREE_BYTES = 2000, 120_000_000
LARGE_FILES = 3000

PLUGIN = """
from plugin_substrate.file_plugin import FilePlugin
class Plugin(FilePlugin):
    name, version, supported_extensions = "{name}", "1", [".txt"]
    def can_handle(self, path, variables):
        return True
    def transform(self, path, ctx):
        pass
"""


def make_plugins(folder: Path) -> PluginRegistry:
    for number in range(PLUGINS):
        package = folder / f"plugin_{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(PLUGIN.format(name=package.name))
        (package / "manifest.yml").write_text(
            f"name: {package.name}\nversion: '1'\nsupported_extensions: [.txt]\napi_version: '1'\n"
        )
    return PluginRegistry(folder)


def make_tree(folder: Path) -> None:
    folder.mkdir()
    content = os.urandom(TREE_BYTES // TREE_FILES)
    for number in range(TREE_FILES):
        parent = folder / f"folder-{number % 40}"
        parent.mkdir(exist_ok=True)
        (parent / f"{number}.bin").write_bytes(content)


async def measure_passes(folder: Path) -> dict[str, Figure]:
    host = PluginHost(make_plugins(folder / "plugins"), run_unlisted=False)
    tree = folder / "tree"
    tree.mkdir()
    names = [f"{number}.txt" for number in range(FILES)]
    for name in names:
        (tree / name).write_text(name)
    context = PluginContext(variables={}, dst_root=tree)

    async def ask(_: object) -> None:
        return None

    async def one_pass(plugins: int) -> tuple[float, int]:
        order = [f"plugin_{number}" for number in range(plugins)]
        started = time.perf_counter()
        result = await host.run_pass(context, names, order, ask)
        seconds = time.perf_counter() - started
        assert [record["status"] for record in result.applied] == ["skipped"] * plugins, result.applied
        return seconds * 1000, max(record["isolation"]["peak_memory_mb"] for record in result.applied)

    await one_pass(1)
    one = [await one_pass(1) for _ in range(ROUNDS)]
    several = [await one_pass(PLUGINS) for _ in range(ROUNDS)]
    further = [(all_of[0] - first[0]) / (PLUGINS - 1) for all_of, first in zip(several, one, strict=True)]
    unconfined = [in_process(tree, names) for _ in range(ROUNDS)]
    return {
        "pass of one plugin over 10 files, p50": Figure(
            value=statistics.median(ms for ms, _ in one),
            unit="ms",
            better="lower",
            target=150,
            baseline=statistics.median(unconfined),
        ),
        "each further plugin, p50": Figure(value=statistics.median(further), unit="ms", better="lower", target=60),
        "peak memory of a worker": Figure(value=max(peak for _, peak in one), unit="MB", better="lower"),
    }


def in_process(tree: Path, names: list[str]) -> float:
    """The same plugin without a process of its own, in milliseconds."""
    scope: dict[str, type] = {}
    started = time.perf_counter()
    exec(PLUGIN.format(name="bare"), scope)  # noqa: S102 - the text above
    plugin = scope["Plugin"]()
    for name in names:
        if plugin.can_handle(tree / name, {}):
            plugin.transform(tree / name, None)
    return (time.perf_counter() - started) * 1000


def measure_staging(folder: Path) -> dict[str, Figure]:
    tree = folder / "large"
    make_tree(tree)
    rounds = max(5, ROUNDS // 4)
    copies: list[float] = []
    compared: list[float] = []
    plain: list[float] = []
    raw: list[float] = []
    workspaces = []
    for number in range(rounds):
        workspace = Workspace(tree, folder, protected=ProtectedPaths(), limits=PassLimits(), supervisor=os.getpid())
        workspaces.append(workspace)
        with timed(copies):
            stage = workspace.stage()
        with timed(compared):
            assert not stage.changes()
        with timed(plain):
            subprocess.run(["cp", "-r", str(tree), str(folder / f"plain-{number}")], check=True)
        content = os.urandom(TREE_BYTES)
        with timed(raw):
            (folder / f"raw-{number}").write_bytes(content)
    for workspace in workspaces:
        workspace.close()
    return {
        f"copy of 2 000 files, 120 MB ({stage.how}), p50": Figure(
            value=statistics.median(copies), unit="ms", better="lower", target=400, baseline=statistics.median(plain)
        ),
        "the same bytes in one file, p50": Figure(value=statistics.median(raw), unit="ms", better="lower"),
        "comparing it byte by byte, p50": Figure(value=statistics.median(compared), unit="ms", better="lower"),
    }


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Add the milliseconds that a block takes."""
    started = time.perf_counter()
    yield
    into.append((time.perf_counter() - started) * 1000)


LARGE_PLUGIN = """
import sys
from plugin_substrate.file_plugin import FilePlugin, PluginInputRequired
class Plugin(FilePlugin):
    name, version, supported_extensions = "large", "1", [".txt"]
    def can_handle(self, path, variables):
        return True
    def pre_transform_all(self, ctx):
        if ctx.extra_inputs is None:
            raise PluginInputRequired([{"id": "x", "label": "l" * 70_000}], "r" * 70_000)
    def transform(self, path, ctx):
        ctx.log.info("m" * 300_000)
        if path.name.endswith("0.txt"):
            sys.stderr.write("y" * 300_000 + "\\n")
        path.write_text("changed")
"""


async def measure_large(folder: Path) -> dict[str, Figure]:
    """3 000 files, lines of 300 kB, a question of 140 kB, and a tree of 2 000 further files and 120 MB."""
    package, tree = folder / "large-plugins" / "large", folder / "large-tree"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(LARGE_PLUGIN)
    (package / "manifest.yml").write_text(
        "name: large\nversion: '1'\nsupported_extensions: [.txt]\napi_version: '1'\nisolation: {timeout_seconds: 300}\n"
    )
    make_tree(tree)
    names = [f"{number}.txt" for number in range(LARGE_FILES)]
    for name in names:
        (tree / name).write_text(name)

    async def answer(_: object) -> dict[str, str]:
        return {"x": "y" * 70_000}

    host = PluginHost(PluginRegistry(package.parent), central_log_dir=folder / "logs")
    own, others = os.times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    before = memory_mb("VmRSS", begin_anew=True)
    started = time.perf_counter()
    async with stalls_of_the_loop() as stalls:
        result = await host.run_pass(PluginContext(variables={}, dst_root=tree), names, [], answer)
    seconds = time.perf_counter() - started
    (record,) = result.applied
    assert record["status"] == "success", record
    after, of_others = os.times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.user + after.system - own.user - own.system
    cpu_of_others = of_others.ru_utime + of_others.ru_stime - others.ru_utime - others.ru_stime
    return {
        "large pass: whole": Figure(value=seconds, unit="s", better="lower"),
        "large pass: longest stall of the loop": Figure(
            value=max(stalls) * 1000, unit="ms", better="lower", target=250
        ),
        "large pass: memory it adds to the host": Figure(value=memory_mb("VmHWM") - before, unit="MB", better="lower"),
        "large pass: peak memory of its worker": Figure(
            value=record["isolation"]["peak_memory_mb"], unit="MB", better="lower"
        ),
        "large pass: processor time of the host": Figure(value=cpu, unit="s", better="lower"),
        "large pass: processor time of its worker": Figure(value=cpu_of_others, unit="s", better="lower"),
        "large pass: its record": Figure(value=len(json.dumps(record)) / 1000, unit="kB", better="lower"),
        "large pass: its log": Figure(
            value=sum(path.stat().st_size for path in (folder / "logs").rglob("*.stderr")) / 1e6,
            unit="MB",
            better="lower",
        ),
    }


@asynccontextmanager
async def stalls_of_the_loop() -> AsyncIterator[list[float]]:
    """Collect by how many seconds each of the loop's turns came late."""
    late = [0.0]

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.005
            await asyncio.sleep(0.005)
            late.append(loop.time() - due)

    watching = asyncio.create_task(watch())
    try:
        yield late
    finally:
        watching.cancel()


def memory_mb(name: str, *, begin_anew: bool = False) -> float:
    """What ``/proc`` says of this process; its peak, VmHWM, can be made to begin anew."""
    if begin_anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def main() -> None:
    arguments = command_line(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = asyncio.run(measure_passes(Path(name)))
        figures |= measure_staging(Path(name))
        figures |= asyncio.run(measure_large(Path(name)))
    report("File pass", figures, as_json=arguments.as_json)


if __name__ == "__main__":
    main()
