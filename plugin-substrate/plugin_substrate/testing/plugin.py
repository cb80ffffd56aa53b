"""The pytest plugin: real plugin workers for each test that asks, gone at its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from plugin_substrate.testing.workers import PluginWorkers


@pytest.fixture(scope="session")
def plugin_environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small virtual environments that workers run in, shared by the tests of a run."""
    return tmp_path_factory.mktemp("plugin-environments")


@pytest.fixture
def plugin_workers(tmp_path: Path, plugin_environments: Path) -> Iterator[PluginWorkers]:
    """A manager with a data folder of its own; what is loaded is unloaded at the end, and what is left fails the test.

    For tests outside an event loop; inside one, ``async with PluginWorkers(tmp_path, environments=...)``.
    """
    from plugin_substrate.testing.workers import PluginWorkers

    with PluginWorkers(tmp_path / "plugins", environments=plugin_environments) as workers:
        yield workers
