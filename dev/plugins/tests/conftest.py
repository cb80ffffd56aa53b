"""The example plugins, installed as a user installs them and called through the manager, in their own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate.interface import CallContext, InputFile
from plugin_substrate.manager import PluginManager

DEV = Path(__file__).parents[2]
ACTIONS = {
    "bom.read": "bom-reader",
    "bom.review": "license-reviewer",
    "bom.report": "report-writer",
    "bom.quarantine": "report-writer",
}


@pytest.fixture(scope="session")
def plugins_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder the plugins are installed in: $PLM_PLUGINS_DIR, to be kept between runs, or a new one."""
    folder = Path(os.environ.get("PLM_PLUGINS_DIR") or tmp_path_factory.mktemp("plugins"))
    tool, plugins = Path(sys.executable).with_name("cjm-ctl"), DEV / "plugins.yaml"
    command = [str(tool), "install-all", "--plugins", str(plugins), "--data-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def manager(plugins_dir: Path) -> Iterator[PluginManager]:
    with_plugins = PluginManager(data_dir=plugins_dir)
    for meta in with_plugins.discover_manifests():
        assert with_plugins.load_plugin(meta)
    yield with_plugins
    with_plugins.unload_all()


@pytest.fixture(scope="session")
def call(manager: PluginManager) -> Callable[..., Any]:
    """Call a capability by its name; ``step_key`` and ``on_progress`` go to the manager, all else to the plugin."""

    def run(action: str, *, step_key: str = "", **arguments: Any) -> Any:
        context = CallContext(call_id=os.urandom(8).hex(), tenant_id="tenant", run_id="run", step_key=step_key)
        return manager.execute_plugin(ACTIONS[action], call=context, action=action, **arguments)

    return run


@pytest.fixture(scope="session")
def sample() -> Callable[[str], InputFile]:
    def read(name: str) -> InputFile:
        return InputFile(name, "application/octet-stream", (DEV / "samples" / name).read_bytes())

    return read


@pytest.fixture(scope="session")
def plan_path() -> Path:
    return DEV / "agents" / "bom-review.yaml"
