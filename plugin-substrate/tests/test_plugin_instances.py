"""Several instances of one plugin, loaded one by one and side by side."""

from __future__ import annotations

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from plugin_substrate import CallContext, PluginLoadError, PluginLoadSpec, PluginManager, PluginNotLoadedError


async def test_new_instances_have_an_id_and_a_worker_of_their_own(manager: PluginManager, probe_meta: Any) -> None:
    instances = [await manager.load_plugin_async(probe_meta(), new_instance=True) for _ in range(3)]
    assert all(re.fullmatch(r"probe-[0-9a-f]{6}", instance.instance_id) for instance in instances)
    assert len({instance.pid for instance in instances}) == 3
    assert {each.instance_id for each in manager.list_instances("probe")} == {each.instance_id for each in instances}
    assert manager.list_instances("another") == []


async def test_a_name_of_full_length_can_have_new_instances(manager: PluginManager, probe_meta: Any) -> None:
    instance = await manager.load_plugin_async(probe_meta(name="n" * 64), new_instance=True)
    assert len(instance.instance_id) == 64


@pytest.mark.parametrize("wrong", ["", "a/b", "a b", "a.b", "n" * 65, "ä", "a\n"])
async def test_an_id_that_could_be_a_path_is_refused(manager: PluginManager, probe_meta: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match="instance_id must be"):
        await manager.load_plugin_async(probe_meta(), instance_id=wrong)


async def test_side_by_side_each_has_its_result_under_its_own_key(manager: PluginManager, probe_meta: Any) -> None:
    results = await manager.load_plugins_concurrent(
        [
            PluginLoadSpec(meta=probe_meta()),
            PluginLoadSpec(meta=probe_meta(), instance_id="second"),
            PluginLoadSpec(meta=probe_meta(), new_instance=True),
            PluginLoadSpec(meta=probe_meta("RaisesOnCreate", name="broken")),
        ],
        max_concurrency=2,
    )
    assert list(results) == ["probe", "second", "probe#new[2]", "broken"]
    assert (results["probe"], results["second"]) == ("probe", "second")
    assert re.fullmatch(r"probe-[0-9a-f]{6}", str(results["probe#new[2]"]))
    assert isinstance(results["broken"], PluginLoadError)
    loaded = [each.instance_id for each in manager.list_instances()]
    assert sorted(loaded) == sorted(str(results[key]) for key in ("probe", "second", "probe#new[2]"))
    assert await manager.unload_plugins_concurrent([*loaded, "nobody"]) == {
        **dict.fromkeys(loaded, True),
        "nobody": False,
    }
    assert manager.list_instances() == []


async def test_failing_fast_begins_nothing_after_the_first_failure(manager: PluginManager, probe_meta: Any) -> None:
    results = await manager.load_plugins_concurrent(
        [
            PluginLoadSpec(meta=probe_meta("RaisesOnCreate", name="broken")),
            PluginLoadSpec(meta=probe_meta()),
        ],
        max_concurrency=1,
        fail_fast=True,
    )
    assert isinstance(results["broken"], PluginLoadError)
    with pytest.raises(PluginNotLoadedError, match="'broken' had failed"):
        raise results["probe"]  # type: ignore[misc]
    assert manager.list_instances() == []


async def test_two_specs_of_one_instance_are_refused_before_anything_is_loaded(
    manager: PluginManager, probe_meta: Any
) -> None:
    with pytest.raises(ValueError, match="several specs"):
        await manager.load_plugins_concurrent([PluginLoadSpec(meta=probe_meta())] * 2)
    assert manager.list_instances() == []


async def _most_at_once(manager: PluginManager, call: Any) -> int:
    """How many of eight calls were in the plugin at the same time."""
    inside: set[str] = set()
    most = 0

    def enter(call_id: str) -> None:
        nonlocal most
        inside.add(call_id)
        most = max(most, manager.get_instance("probe").running_calls)

    await asyncio.gather(*(call(f"call-{number}", enter) for number in range(8)))
    return most


async def test_an_instance_takes_as_many_calls_at_a_time_as_it_was_loaded_for(
    manager: PluginManager, probe_meta: Any
) -> None:
    await manager.load_plugin_async(probe_meta(), max_concurrent_requests=3)

    async def call(call_id: str, enter: Any) -> None:
        await manager.execute_call(
            "probe", action="probe.report", steps=3, call=CallContext(call_id), on_progress=lambda *_: enter(call_id)
        )

    assert 1 < await _most_at_once(manager, call) <= 3


def test_the_synchronous_face_keeps_the_same_bound(tmp_path: Path, probe_meta: Any) -> None:
    manager = PluginManager(data_dir=tmp_path)
    together = threading.Barrier(8)
    try:
        assert manager.load_plugin(probe_meta(), max_concurrent_requests=2)

        def call(number: int) -> Any:
            together.wait()
            return manager.execute_plugin("probe", action="probe.together")

        with ThreadPoolExecutor(8) as threads:
            assert max(threads.map(call, range(8))) == 2
    finally:
        manager.unload_all()
