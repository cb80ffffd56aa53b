"""What a pass of file plugins over a folder costs: the whole pass, one plugin more, and the copy of a large tree.

Everything is real: the supervisor, confined workers, the copy, the comparison and the way back. The baselines are what
the same plugin code takes in this process, without any isolation, and `shutil.copytree` of the same tree.
BENCH_ROUNDS scales it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from figures import Figure, command_line, report
from plugin_substrate.passes import PassLimits, PluginContext, PluginHost, PluginRegistry, ProtectedPaths
from plugin_substrate.passes.workspace import Workspace

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "20"))
FILES = 10
PLUGINS = 5
TREE_FILES, TREE_BYTES = 2000, 120_000_000

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
    copies, compared, plain = [], [], []
    for _ in range(max(3, ROUNDS // 4)):
        workspace = Workspace(tree, folder, protected=ProtectedPaths(), limits=PassLimits())
        started = time.perf_counter()
        stage = workspace.stage()
        copies.append((time.perf_counter() - started) * 1000)
        started = time.perf_counter()
        assert not stage.changes()
        compared.append((time.perf_counter() - started) * 1000)
        workspace.close()
        started = time.perf_counter()
        shutil.copytree(tree, folder / "plain")
        plain.append((time.perf_counter() - started) * 1000)
        shutil.rmtree(folder / "plain")
    return {
        "copy of 2 000 files, 120 MB, p50": Figure(
            value=statistics.median(copies),
            unit="ms",
            better="lower",
            target=400,
            baseline=statistics.median(plain),
        ),
        "comparing it byte by byte, p50": Figure(value=statistics.median(compared), unit="ms", better="lower"),
    }


def main() -> None:
    arguments = command_line(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = asyncio.run(measure_passes(Path(name)))
        figures |= measure_staging(Path(name))
    report("File pass", figures, as_json=arguments.as_json)


if __name__ == "__main__":
    main()
