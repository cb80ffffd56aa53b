"""A pipeline: plugins, bindings and a queue in one block."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from plugin_substrate import PluginMeta, PluginNotLoadedError, write_manifest
from plugin_substrate.bootstrap import create_pipeline
from plugin_substrate.testing.leftovers import descendants


@pytest.fixture
def data_dir(tmp_path: Path, probe_meta: Callable[..., PluginMeta]) -> Path:
    folder = tmp_path / "manifests"
    folder.mkdir()
    for name, class_name in (("probe", "Probe"), ("broken", "RaisesOnInitialize")):
        write_manifest(folder / f"{name}.json", probe_meta(class_name, name=name).manifest)
    return tmp_path


async def test_a_pipeline_loads_what_it_can_and_says_what_it_could_not(data_dir: Path) -> None:
    plugins = [("probe", {"x": 1}), {"name": "broken"}, "nobody"]
    pipeline = await create_pipeline(plugins, data_dir=data_dir, queue_kwargs={"max_history": 7}, strict=False)
    assert list(pipeline.bindings) == ["probe"]
    assert {name: type(error).__name__ for name, error in pipeline.failed.items()} == {
        "broken": "PluginLoadError",
        "nobody": "PluginNotLoadedError",
    }
    async with pipeline:
        job_id = await pipeline.queue.submit("probe", action="probe.echo", x=1)
        assert (await pipeline.queue.wait_for_job(job_id, 60)).result == {"x": 1}
        assert await pipeline.bindings["probe"].execute_async(action="probe.echo", y=2) == {"y": 2}
    assert pipeline.manager.list_instances() == []


async def test_a_pipeline_that_cannot_be_made_leaves_no_process(data_dir: Path) -> None:
    before = descendants(os.getpid())
    with pytest.raises(PluginNotLoadedError):
        await create_pipeline(["probe"], data_dir=data_dir, system_monitor="nobody")
    with pytest.raises(TypeError):
        await create_pipeline(["probe"], data_dir=data_dir, queue_kwargs={"unknown": 1})
    with pytest.raises(ValueError, match="a plugin is a name"):
        await create_pipeline([{"names": "probe"}], data_dir=data_dir)
    assert descendants(os.getpid()) == before
