"""Three plugins with real libraries, installed as users install theirs: each in an environment of its own.

Two of them need different majors of pydantic, and one runs on another Python than the tests where one is found.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from plugin_substrate import PluginFatalError, PluginMeta
from plugin_substrate.discovery import find_manifests
from plugin_substrate.environments.install import Installer
from plugin_substrate.environments.spec import load_plugins_file
from plugin_substrate.environments.uv import find_interpreter
from plugin_substrate.testing import PluginWorker, PluginWorkers

HERE = Path(__file__).parent
PLUGINS = """
plugins:
  - name: forecaster
    env_name: forecaster
    package: {here}/forecaster
  - name: plotter
    env_name: plotter
    package: {here}/plotter
    python_version: "{other_python}"
  - name: transcoder
    env_name: transcoder
    package: {here}/transcoder
    isolation:
      processes: 4
"""


@pytest.fixture(scope="session")
def other_python() -> str:
    """Another minor version of Python that is installed here and that pydantic 1 runs on, else the one of the tests."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for version in ("3.12", "3.13", "3.11"):
        with suppress(PluginFatalError):
            if version != here:
                find_interpreter(version)
                return version
    return here


@pytest.fixture(scope="session")
def metas(tmp_path_factory: pytest.TempPathFactory, other_python: str) -> dict[str, PluginMeta]:
    """The installed plugins. Below $PLM_PLUGINS_DIR they are kept for the next run, which then installs nothing."""
    kept = os.environ.get("PLM_PLUGINS_DIR")
    data_dir = Path(kept, "real-libraries") if kept else tmp_path_factory.mktemp("real-libraries")
    data_dir.mkdir(parents=True, exist_ok=True)
    plugins = data_dir / "plugins.yaml"
    plugins.write_text(PLUGINS.format(here=HERE, other_python=other_python), encoding="utf-8")
    installer = Installer(data_dir)
    outcomes = [installer.install(spec) for spec in load_plugins_file(plugins)]
    assert not [outcome for outcome in outcomes if outcome.status == "failed"]
    found, rejected = find_manifests([data_dir / "manifests"])
    assert not rejected
    return {meta.name: meta for meta in found}


@pytest.fixture(scope="module")
def real_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PluginWorkers]:
    """A manager with default settings, for all tests of a module."""
    with PluginWorkers(tmp_path_factory.mktemp("host")) as workers:
        yield workers


@pytest.fixture(scope="module")
def forecaster(real_workers: PluginWorkers, metas: dict[str, PluginMeta]) -> PluginWorker:
    return real_workers.start(metas["forecaster"], {"trees": 20})


@pytest.fixture(scope="module")
def plotter(real_workers: PluginWorkers, metas: dict[str, PluginMeta]) -> PluginWorker:
    return real_workers.start(metas["plotter"])


@pytest.fixture(scope="module")
def transcoder(real_workers: PluginWorkers, metas: dict[str, PluginMeta]) -> PluginWorker:
    return real_workers.start(metas["transcoder"])
