"""What a supervisor and its workers import, and when: a first load waits for nothing that only others need."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import plugin_substrate
from plugin_substrate import PluginManager, PluginMeta

MetaFactory = Callable[..., PluginMeta]

#: Of the standard library, each takes a start some milliseconds, and no plugin needs them to be loaded.
SLOW = {"dataclasses", "datetime", "inspect", "logging", "pathlib", "traceback"}
SHARED_LATER = {"datetime", "logging", "pathlib", "traceback"}


async def test_a_first_worker_waits_for_nothing_that_it_does_not_need_and_later_ones_find_it(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    meta = probe_meta("Sparse", "sparse", "sparse")
    await manager.load_plugin_async(meta)
    assert not SLOW.intersection(await manager.execute_plugin_async("sparse"))
    async with asyncio.timeout(60):
        while True:
            await manager.load_plugin_async(meta, instance_id="later")
            found = await manager.execute_plugin_async("later")
            await manager.unload_plugin_async("later")
            if SHARED_LATER.issubset(found):
                break
            await asyncio.sleep(0.05)


def log_of(folder: Path) -> str:
    return "".join(file.read_text() for file in folder.rglob("*.log"))


async def test_what_is_logged_becomes_lines_though_logging_is_imported_in_a_call(
    manager: PluginManager, probe_meta: MetaFactory, tmp_path: Path
) -> None:
    await manager.load_plugin_async(probe_meta("Sparse", "sparse", "sparse"))
    await manager.execute_plugin_async("sparse", log="seen at last")
    await manager.unload_plugin_async("sparse")
    assert "[INFO] sparse: seen at last" in log_of(tmp_path)


def test_logging_is_as_it_always_is_but_configured(probe_python: Path) -> None:
    """Looked for, imported, imported anew: it has its own loader, its source, and one handler."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import types
package = sys.modules["plugin_substrate"] = types.ModuleType("plugin_substrate")
package.__path__ = [sys.argv[1] + "/plugin_substrate"]
from plugin_substrate.worker import logs
logs.log_to_output()
logs.log_to_output()
assert "logging" not in sys.modules
import importlib.util
assert importlib.util.find_spec("logging").origin.endswith("__init__.py")
import logging
import inspect
assert type(logging.__loader__).__name__ == type(logging.__spec__.loader).__name__ == "SourceFileLoader"
assert "def basicConfig" in inspect.getsource(logging)
logging.info("first")
importlib.reload(logging).info("second")
assert len(logging.root.handlers) == 1
"""
    root = str(Path(plugin_substrate.__file__).parent.parent)
    ran = subprocess.run(
        [probe_python, "-I", "-S", "-B", "-c", code, root], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "[INFO] root: first\n[INFO] root: second\n")
