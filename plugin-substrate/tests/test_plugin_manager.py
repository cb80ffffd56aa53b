"""The verbs of a manager, with real plugins in real workers."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from plugin_substrate import (
    CallContext,
    ConfigOption,
    FieldOptions,
    PluginConfigError,
    PluginDisabledError,
    PluginError,
    PluginInputError,
    PluginLoadError,
    PluginManager,
    PluginMeta,
    PluginNotLoadedError,
    PluginTimeoutError,
    WorkerDiedError,
)
from plugin_substrate.manifest import DriftSection, compute_config_schema_hash, write_manifest
from plugin_substrate.stores.config import InMemoryPluginConfigStore, PluginConfigRecord
from plugin_substrate.stores.secret import InMemorySecretStore

MetaFactory = Callable[..., PluginMeta]

SCHEMA = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "default": "small", "minLength": 1},
        "device": {"enum": ["cpu", "gpu"], "default": "cpu"},
        "index": {"type": "string", "default": "flat"},
        "threshold": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
    },
}
DEFAULTS = {"model": "small", "device": "cpu", "index": "flat", "threshold": 0.5}
VARIABLES = (
    {"name": "SERVICE_TOKEN", "secret": True, "required": True, "label": "Token"},
    {"name": "REGION", "default": "north"},
)
NAME = "adjustable"


@pytest.fixture
def meta(probe_meta: MetaFactory) -> MetaFactory:
    return lambda class_name="Adjustable", **code: probe_meta(
        class_name, NAME, NAME, **{"config_schema": SCHEMA, "worker_env": VARIABLES, **code}
    )


def diary(tmp_path: Path) -> list[str]:
    (file,) = (tmp_path / "data" / "data" / NAME).glob("*/diary")
    return file.read_text().splitlines()


def files_with(text: bytes, folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and text in file.read_bytes()]


def processes_of_this_host() -> list[Path]:
    return list(Path("/proc").glob("[0-9]*"))


def command_line(process: Path) -> bytes:
    with suppress(OSError):
        return (process / "cmdline").read_bytes()
    return b""


async def config_in_worker(manager: PluginManager, instance_id: str = NAME) -> tuple[dict[str, object], int]:
    config, pid = await manager.execute_plugin_async(instance_id, action="adjust.config")
    return config, pid


# -- loading


async def test_a_wrong_configuration_is_refused_before_anything_is_started(
    manager: PluginManager, meta: MetaFactory, tmp_path: Path
) -> None:
    with pytest.raises(PluginConfigError) as caught:
        await manager.load_plugin_async(meta(), {"threshold": 7, "colour": 1})
    assert set(caught.value.fields_invalid) == {"threshold", "colour"}
    assert not (tmp_path / "data" / "data").exists()
    assert not (tmp_path / "data" / "logs").exists()


async def test_not_strict_drops_what_is_unknown(manager: PluginManager, meta: MetaFactory) -> None:
    view = await manager.load_plugin_async(meta(), {"model": "large", "colour": 1}, strict=False)
    assert view.config == (await config_in_worker(manager))[0] == {**DEFAULTS, "model": "large"}


async def test_new_instances_have_ids_of_their_own_and_a_wrong_id_is_refused(
    manager: PluginManager, meta: MetaFactory
) -> None:
    first = await manager.load_plugin_async(meta(), new_instance=True)
    second = await manager.load_plugin_async(meta(), {"model": "large"}, new_instance=True)
    assert first.instance_id != second.instance_id
    assert all(re.fullmatch(r"adjustable-[0-9a-f]{6}", view.instance_id) for view in (first, second))
    assert {view.instance_id for view in manager.list_instances(NAME)} == {first.instance_id, second.instance_id}
    for wrong in ("", "a b", "../x", "x" * 65):
        with pytest.raises(ValueError, match="1 to 64"):
            await manager.load_plugin_async(meta(), instance_id=wrong)


async def test_two_loads_at_once_that_read_the_kept_configuration_give_one_worker(
    manager: PluginManager, meta: MetaFactory
) -> None:
    views = await asyncio.gather(*(manager.load_plugin_async(meta()) for _ in range(5)))
    assert len({view.pid for view in views}) == 1


async def test_load_all_goes_on_past_a_plugin_that_fails(
    manager: PluginManager, meta: MetaFactory, probe_meta: MetaFactory, tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "manifests"
    write_manifest(folder / "a.json", probe_meta("NeverThere", "probe", "broken").manifest)
    write_manifest(folder / "b.json", meta().manifest)
    manager.discover_manifests()
    loaded = await manager.load_all_async({NAME: {"model": "large"}})
    assert isinstance(loaded["broken"], PluginLoadError)
    assert (await config_in_worker(manager))[0]["model"] == "large"


def test_the_synchronous_verbs_answer_true_or_false(meta: MetaFactory, tmp_path: Path) -> None:
    manager = PluginManager(data_dir=tmp_path / "data", grace_seconds=0.3)
    try:
        assert not manager.load_plugin(meta(), {"model": "unloadable"})
        assert not manager.load_plugin(meta(), {"threshold": 7})
        assert manager.load_plugin(meta())
        assert manager.update_plugin_config(NAME, {"model": "large"})
        with pytest.raises(PluginConfigError):
            manager.update_plugin_config(NAME, {"threshold": 7})
        assert manager.reload_plugin(NAME)
        assert not manager.reload_plugin("unknown")
        assert manager.disable_plugin(NAME)
        assert manager.enable_plugin(NAME)
        assert not manager.enable_plugin("unknown")
        assert manager.prefetch(NAME)
        assert manager.get_config_options(NAME)
        handle = manager.get_plugin(NAME)
        assert handle is not None
        assert handle.execute_with_oom_check(action="adjust.environment", name="REGION") == "north"
        assert list(handle.execute_stream_sync(action="adjust.environment", name="REGION")) == ["north"]
        assert handle.get_current_config()["model"] == "large"
        assert handle.config_options()
        assert handle.get_stats().instance_id == NAME
        assert handle.reconfigure({"model": "large"}).config["model"] == "large"
        assert handle.prefetch()
        with pytest.raises(PluginInputError, match="not a system monitor"):
            handle.get_system_status()
        assert manager.execute_plugin(NAME, action="adjust.config")[0]["model"] == "large"
        assert manager.unload_plugin(NAME)
        assert not manager.unload_plugin(NAME)
    finally:
        manager.unload_all()


# -- reloading


async def test_a_dead_worker_is_reloaded_and_nothing_is_forgotten(manager: PluginManager, meta: MetaFactory) -> None:
    before = await manager.load_plugin_async(
        meta(), {"model": "large"}, instance_id="second", max_concurrent_requests=3
    )
    with pytest.raises(WorkerDiedError):
        await manager.execute_plugin_async("second", action="adjust.quit")
    await manager.disable_plugin_async("second")
    after = await manager.reload_plugin_async("second")
    assert after.alive
    assert after.pid != before.pid
    assert (after.config, after.max_concurrent_requests, after.enabled) == (before.config, 3, False)
    await manager.enable_plugin_async("second")
    assert (await config_in_worker(manager, "second"))[0] == before.config


async def test_a_reload_takes_over_a_configuration_and_checks_it_first(
    manager: PluginManager, meta: MetaFactory
) -> None:
    before = await manager.load_plugin_async(meta())
    with pytest.raises(PluginConfigError):
        await manager.reload_plugin_async(NAME, {"threshold": 7})
    assert manager.get_instance(NAME).pid == before.pid
    assert (await manager.reload_plugin_async(NAME, {"model": "large"})).config["model"] == "large"


async def test_a_failed_reload_leaves_the_instance_as_it_was_for_the_next_call(
    manager: PluginManager, meta: MetaFactory
) -> None:
    await manager.load_plugin_async(meta())
    with pytest.raises(PluginLoadError, match="no such model"):
        await manager.reload_plugin_async(NAME, {"model": "unloadable"})
    view = manager.get_instance(NAME)
    assert (view.alive, view.config) == (False, DEFAULTS)
    assert (await config_in_worker(manager))[0] == DEFAULTS


# -- configurations


async def test_an_update_replaces_the_configuration_in_the_same_worker_and_is_kept_for_later_loads(
    manager: PluginManager, meta: MetaFactory
) -> None:
    before = await manager.load_plugin_async(meta(), {"model": "large", "index": "tree"})
    view = await manager.update_plugin_config_async(NAME, {"threshold": 0.7})
    assert view.config == {**DEFAULTS, "threshold": 0.7}  # replaced, not merged
    assert view.pid == before.pid
    await manager.unload_plugin_async(NAME)
    assert (await manager.load_plugin_async(meta())).config["threshold"] == 0.7
    await manager.unload_plugin_async(NAME)
    assert (await manager.load_plugin_async(meta(), {"threshold": 0.1})).config["threshold"] == 0.1


async def test_what_is_set_for_other_instances_is_not_kept(manager: PluginManager, meta: MetaFactory) -> None:
    await manager.load_plugin_async(meta(), instance_id="second")
    await manager.update_plugin_config_async("second", {"threshold": 0.7})
    await manager.disable_plugin_async("second")
    view = await manager.load_plugin_async(meta())
    assert (view.config, view.enabled) == (DEFAULTS, True)


async def test_reconfigure_lasts_until_the_instance_is_unloaded(manager: PluginManager, meta: MetaFactory) -> None:
    await manager.load_plugin_async(meta())
    await manager.reconfigure_async(NAME, {"threshold": 0.7})
    assert manager.get_plugin_config(NAME)["threshold"] == 0.7
    await manager.unload_plugin_async(NAME)
    assert (await manager.load_plugin_async(meta())).config == DEFAULTS


async def test_an_update_that_the_plugin_refuses_changes_nothing(manager: PluginManager, meta: MetaFactory) -> None:
    await manager.load_plugin_async(meta("Applying"))
    with pytest.raises(PluginInputError, match="not this one"):
        await manager.update_plugin_config_async(NAME, {"model": "refused"})
    assert (await config_in_worker(manager))[0] == manager.get_plugin_config(NAME) == DEFAULTS
    await manager.unload_plugin_async(NAME)
    assert (await manager.load_plugin_async(meta("Applying"))).config == DEFAULTS


async def test_an_update_of_a_dead_worker_starts_one_with_it(manager: PluginManager, meta: MetaFactory) -> None:
    await manager.load_plugin_async(meta())
    with suppress(WorkerDiedError):
        await manager.execute_plugin_async(NAME, action="adjust.quit")
    view = await manager.update_plugin_config_async(NAME, {"model": "large"})
    assert (view.alive, view.config["model"]) == (True, "large")


async def test_a_kept_setting_that_the_plugin_no_longer_has_does_not_keep_it_from_loading(
    meta: MetaFactory, tmp_path: Path
) -> None:
    store = InMemoryPluginConfigStore()
    store.set(PluginConfigRecord(plugin_name=NAME, config={"colour": 1, "model": "large"}))
    async with PluginManager(data_dir=tmp_path, config_store=store) as manager:
        assert (await manager.load_plugin_async(meta())).config == {**DEFAULTS, "model": "large"}


async def test_live_options_arrive_typed_and_a_plugin_that_fails_has_none(
    manager: PluginManager, meta: MetaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await manager.load_plugin_async(meta())
    assert await manager.get_config_options_async(NAME) == {
        "device": FieldOptions([ConfigOption("cpu", "Processor", {"cores": 2})], {"maximum": 1})
    }
    await manager.load_plugin_async(meta("Optionless"), instance_id="second")
    assert await manager.get_config_options_async("second") == {}
    with pytest.raises(PluginNotLoadedError):
        await manager.get_config_options_async("third")


async def test_configurations_and_schemas_can_be_asked_for(manager: PluginManager, meta: MetaFactory) -> None:
    await manager.load_plugin_async(meta(), {"model": "large"})
    await manager.load_plugin_async(meta(), instance_id="second")
    assert manager.get_all_plugin_configs() == {NAME: {**DEFAULTS, "model": "large"}, "second": DEFAULTS}
    assert manager.get_plugin_config_schema("second") == SCHEMA
    with pytest.raises(PluginNotLoadedError):
        manager.get_plugin_config_schema("third")


# -- on and off


async def test_a_disabled_instance_keeps_its_worker_takes_no_calls_and_stays_so_when_loaded_again(
    manager: PluginManager, meta: MetaFactory, tmp_path: Path
) -> None:
    before = await manager.load_plugin_async(meta())
    assert await manager.disable_plugin_async(NAME)
    assert not await manager.disable_plugin_async(NAME)
    with pytest.raises(PluginDisabledError, match="enable_plugin"):
        await manager.execute_plugin_async(NAME, action="adjust.config")
    assert manager.get_instance(NAME).pid == before.pid
    await manager.unload_plugin_async(NAME)
    assert not (await manager.load_plugin_async(meta())).enabled
    assert await manager.enable_plugin_async(NAME)
    assert await config_in_worker(manager)
    assert [line for line in diary(tmp_path) if line.startswith("on_")] == ["on_disable", "on_enable"]


async def test_a_stream_counts_as_running_and_finds_a_disabled_instance_closed(
    manager: PluginManager, meta: MetaFactory, tmp_path: Path
) -> None:
    await manager.load_plugin_async(meta())
    started = asyncio.Event()
    stream = manager.execute_plugin_stream(NAME, action="adjust.polite", on_progress=lambda *_: started.set())
    task = asyncio.ensure_future(anext(stream))
    await asyncio.wait_for(started.wait(), 30)
    await manager.disable_plugin_async(NAME)
    assert "on_disable" not in diary(tmp_path)
    with pytest.raises(PluginDisabledError):
        await anext(manager.execute_plugin_stream(NAME, action="adjust.config"))
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await stream.aclose()
    async with asyncio.timeout(30):
        while "on_disable" not in diary(tmp_path):  # noqa: ASYNC110 - it is a file that is watched
            await asyncio.sleep(0.002)


async def test_of_many_changes_at_once_the_last_is_the_one_that_is_kept(meta: MetaFactory, tmp_path: Path) -> None:
    store = InMemoryPluginConfigStore()
    async with PluginManager(data_dir=tmp_path, config_store=store, grace_seconds=0.3) as manager:
        await manager.load_plugin_async(meta("Applying"))
        updates = [manager.update_plugin_config_async(NAME, {"threshold": number / 10}) for number in range(10)]
        switches = [manager.disable_plugin_async(NAME), manager.enable_plugin_async(NAME)]
        await asyncio.gather(*updates, *switches)
        view, kept = manager.get_instance(NAME), store.get(NAME)
        assert kept is not None
        assert (kept.config, kept.enabled) == (view.config, view.enabled)


# -- prefetch


async def test_prefetch_tells_its_progress_as_it_comes(
    manager: PluginManager, meta: MetaFactory, tmp_path: Path
) -> None:
    await manager.load_plugin_async(meta())
    heard: list[tuple[float, str]] = []
    assert await manager.prefetch_async(NAME, on_progress=lambda *report: heard.append(report))
    assert heard == [(0.0, "fetching"), (1 / 3, "fetching"), (2 / 3, "fetching")]
    assert "prefetched" in diary(tmp_path)


async def test_a_prefetch_that_stalls_loses_its_worker_and_says_where_it_stood(
    meta: MetaFactory, tmp_path: Path
) -> None:
    async with PluginManager(data_dir=tmp_path, prefetch_stall_threshold_seconds=0.3) as manager:
        before = await manager.load_plugin_async(meta(), {"model": "stalled"})
        with pytest.raises(PluginTimeoutError, match=r"has not moved on for 0\.3 s \(last: 67% fetching\)") as caught:
            await manager.prefetch_async(NAME)
        assert caught.value.timeout_seconds == 0.3
        assert not manager.get_instance(NAME).alive
        assert (await config_in_worker(manager))[1] != before.pid


async def test_what_a_prefetch_raises_arrives_typed(manager: PluginManager, meta: MetaFactory) -> None:
    await manager.load_plugin_async(meta(), {"model": "missing"})
    with pytest.raises(PluginInputError, match="no such model"):
        await manager.prefetch_async(NAME)


# -- variables and secrets


async def test_a_worker_finds_its_defaults_and_secrets_and_a_new_secret_reaches_every_instance(
    manager: PluginManager, meta: MetaFactory, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async def seen(instance_id: str, name: str) -> object:
        return await manager.execute_plugin_async(instance_id, action="adjust.environment", name=name)

    with caplog.at_level(logging.WARNING):
        await manager.load_plugin_async(meta())
    assert "lacks SERVICE_TOKEN" in caplog.text
    await manager.load_plugin_async(meta(), instance_id="second")
    assert await seen(NAME, "REGION") == "north"
    assert await seen(NAME, "SERVICE_TOKEN") is None
    assert manager.missing_required_env(NAME) == ["SERVICE_TOKEN"]
    await manager.set_plugin_secret_async("second", "SERVICE_TOKEN", "s3cret-value")
    assert [await seen(name, "SERVICE_TOKEN") for name in (NAME, "second")] == ["s3cret-value"] * 2
    assert manager.missing_required_env(NAME) == []
    status = {entry.spec.name: (entry.source, entry.is_set) for entry in manager.get_worker_env_status(NAME)}
    assert status == {"SERVICE_TOKEN": ("secret", True), "REGION": ("default", True)}
    assert "s3cret-value" not in repr(manager.get_worker_env_status(NAME)) + caplog.text + repr(vars(manager))
    assert files_with(b"s3cret-value", tmp_path) == [tmp_path / "data" / "secrets" / "secrets.json"]
    assert [pid for pid in processes_of_this_host() if b"s3cret-value" in command_line(pid)] == []


async def test_only_declared_secrets_reach_a_worker_and_without_reload_only_the_next_one(
    meta: MetaFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = InMemorySecretStore()
    store.set_secret(NAME, "OTHER", "undeclared")
    async with PluginManager(data_dir=tmp_path, secret_store=store, grace_seconds=0.3) as manager:
        await manager.load_plugin_async(meta())
        await manager.set_plugin_secret_async(NAME, "SERVICE_TOKEN", "later", reload=False)
        for name in ("OTHER", "SERVICE_TOKEN"):
            assert await manager.execute_plugin_async(NAME, action="adjust.environment", name=name) is None
        await manager.reload_plugin_async(NAME)
        assert await manager.execute_plugin_async(NAME, action="adjust.environment", name="SERVICE_TOKEN") == "later"
        await manager.set_plugin_secret_async(NAME, "TYPO", "x", reload=False)
        assert "declares no secret TYPO" in caplog.text
        with pytest.raises(PluginNotLoadedError):
            await manager.set_plugin_secret_async("unknown", "SERVICE_TOKEN", "x")


async def test_a_secret_of_one_tenant_reaches_its_workers_alone(
    meta: MetaFactory, probe_meta: MetaFactory, tmp_path: Path
) -> None:
    store = InMemorySecretStore()
    for name in (NAME, "keeper"):
        store.set_secret(name, "SERVICE_TOKEN", "everybody's")
    async with PluginManager(data_dir=tmp_path, secret_store=store, grace_seconds=0.3) as manager:

        async def seen(tenant: str) -> object:
            call = CallContext(f"by {tenant}", tenant)
            return await manager.execute_plugin_async(
                NAME, action="adjust.environment", name="SERVICE_TOKEN", call=call
            )

        await manager.load_plugin_async(meta())
        await manager.set_plugin_secret_async(NAME, "SERVICE_TOKEN", "mine", scope="me")
        assert [await seen(tenant) for tenant in ("me", "you", "")] == ["mine", "everybody's", "everybody's"]
        await manager.load_plugin_async(
            probe_meta("Keeper", "keeper", "keeper", stateless=True, worker_env=VARIABLES[:1])
        )
        await manager.set_plugin_secret_async("keeper", "SERVICE_TOKEN", "mine", scope="me")
        found = await manager.execute_plugin_async("keeper", action="keeper.find", call=CallContext("c", "me"))
        assert found["environment"]["SERVICE_TOKEN"] == "everybody's"


# -- drift


async def test_a_schema_that_is_no_longer_the_manifests_is_told_and_the_manifests_stays_in_force(
    manager: PluginManager, meta: MetaFactory, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        await manager.load_plugin_async(meta("Drifted"))
    found = manager.get_plugin_meta(NAME)
    assert found is not None
    assert found.config_schema_drift
    assert found.live_config_schema == {**SCHEMA, "title": "newer"}
    assert found.config_schema == SCHEMA
    assert "cjm-ctl regenerate-manifest adjustable" in caplog.text


@pytest.mark.parametrize("class_name", ["Adjustable", "Undescribed"])
async def test_without_drift_and_without_an_answer_there_is_no_drift(
    manager: PluginManager, meta: MetaFactory, class_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    await manager.load_plugin_async(meta(class_name))
    found = manager.get_plugin_meta(NAME)
    assert found is not None
    assert (found.config_schema_drift, found.live_config_schema) == (False, None)
    assert "regenerate-manifest" not in caplog.text


async def test_a_plugin_that_never_answers_holds_up_neither_its_load_nor_its_calls(
    manager: PluginManager, meta: MetaFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plugin_substrate.managing.configuring._QUESTION_SECONDS", 0.2)
    monkeypatch.setattr("plugin_substrate.instance._HOOK_SECONDS", 0.2)
    await manager.load_plugin_async(meta("NeverAnswers"))
    assert await manager.get_config_options_async(NAME) == {}
    assert (await config_in_worker(manager))[0] == DEFAULTS
    assert await manager.disable_plugin_async(NAME)
    assert await manager.enable_plugin_async(NAME)
    assert (await config_in_worker(manager))[0] == DEFAULTS


async def test_the_recorded_hash_counts_and_the_check_can_be_switched_off(meta: MetaFactory, tmp_path: Path) -> None:
    plain = meta()
    stale = DriftSection(config_schema_hash=compute_config_schema_hash({"title": "older"}))
    drifted = replace(plain, manifest=replace(plain.manifest, drift_tracking=stale))
    for detection in (True, False):
        async with PluginManager(data_dir=tmp_path, drift_detection=detection) as manager:
            await manager.load_plugin_async(drifted)
            found = manager.get_plugin_meta(NAME)
            assert found is not None
            assert found.config_schema_drift is detection


# -- finding


def test_new_plugins_are_taken_in_beside_those_that_are_known_which_stay(
    probe_meta: MetaFactory, tmp_path: Path
) -> None:
    def put(name: str, **code: object) -> None:
        write_manifest(tmp_path / "manifests" / f"{name}.json", probe_meta(name=name, **code).manifest)

    put("a", idempotent=False)
    manager = PluginManager(data_dir=tmp_path)
    (known,) = manager.discover_manifests()
    put("a", idempotent=True)
    put("b")
    (new,) = manager.look_for_new()
    assert new.name == "b"
    assert manager.get_discovered_meta("b") is None, "it was looked for, and not taken in"
    manager.add_discovered([new, probe_meta(name="a")])
    assert manager.get_discovered_meta("a") is known
    assert manager.get_discovered_meta("b") is new
    assert manager.look_for_new() == []


async def test_plugins_are_found_by_what_they_are_for(
    probe_meta: MetaFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def put(name: str, overrides: dict[str, object] | None = None, **code: object) -> None:
        manifest = replace(probe_meta(name=name, **code).manifest, overrides=overrides or {})
        write_manifest(tmp_path / "manifests" / f"{name}.json", manifest)

    speech = {"domain": "speech_to_text", "role": "Transcriber"}
    put("a", taxonomy=speech)
    put("b", {"category_override": "Old Hands"}, taxonomy=speech, resources={"platforms": ["plan9-x64"]})
    put(
        "c", taxonomy={"domain": "plots", "role": "Plotter"}, resources={"min_system_ram_mb": 100, "requires_gpu": True}
    )
    manager = PluginManager(data_dir=tmp_path)
    found = {meta.name: meta for meta in manager.discover_manifests()}
    names: Callable[[list[PluginMeta]], list[str]] = lambda metas: [meta.name for meta in metas]  # noqa: E731
    assert names(manager.get_by_domain("speech_to_text")) == names(manager.get_by_role("Transcriber")) == ["a", "b"]
    assert names(manager.get_by_category("Speech To Text")) == ["a"]
    assert names(manager.get_by_category("Old Hands")) == ["b"]
    assert manager.get_canonical("Transcriber") is None
    assert "there are a, b" in caplog.text
    assert manager.get_canonical("Plotter") == found["c"]
    assert manager.get_canonical("Painter") is None
    assert names(manager.get_compatible_for_current_platform()) == ["a", "c"]
    assert (found["c"].resources.requires_gpu, found["c"].resources.min_system_ram_mb) == (True, 100)
    assert found["c"].worker_env == ()


async def test_a_plugin_is_told_with_how_its_instance_stands(manager: PluginManager, meta: MetaFactory) -> None:
    assert manager.get_plugin_meta(NAME) is None
    assert manager.list_plugins() == []
    assert manager.get_plugin(NAME) is None
    await manager.load_plugin_async(meta())
    await manager.load_plugin_async(meta(), instance_id="second")
    await config_in_worker(manager)
    found = manager.get_plugin_meta(NAME)
    assert found is not None
    assert found.instance == manager.get_instance(NAME)
    assert found.enabled
    assert found.last_executed is not None
    assert [meta.name for meta in manager.list_plugins()] == [NAME]
    handle = manager.get_plugin("second")
    assert handle is not None
    assert (await handle.execute_async(action="adjust.config"))[0] == DEFAULTS


async def test_a_binding_has_the_verbs_of_one_plugin(manager: PluginManager, meta: MetaFactory, tmp_path: Path) -> None:
    binding = manager.bind(NAME, {"model": "large"})
    with pytest.raises(PluginNotLoadedError, match="discover_manifests"):
        await binding.load_async()
    write_manifest(tmp_path / "data" / "manifests" / "a.json", meta().manifest)
    manager.discover_manifests()
    assert not binding.is_loaded
    await binding.load_async()
    assert binding.is_loaded
    assert binding.get_config()["model"] == "large"
    assert (await binding.update_config_async({"model": "small"})).config == DEFAULTS
    assert (await binding.reload_async({"model": "large"})).config["model"] == "large"
    assert await binding.prefetch_async()
    assert (await binding.execute_async(action="adjust.config"))[0]["model"] == "large"
    assert binding.get_config_schema() == SCHEMA
    assert "fetching" in binding.get_logs()
    assert binding.is_alive
    assert [chunk async for chunk in binding.execute_stream(action="adjust.environment", name="REGION")] == ["north"]
    assert (await binding.reconfigure_async({"threshold": 0.1})).config["threshold"] == 0.1
    assert await binding.unload_async()


# -- logs


async def test_each_instance_has_a_log_of_its_own_with_times_and_calls(
    manager: PluginManager, meta: MetaFactory, tmp_path: Path
) -> None:
    assert manager.get_plugin_logs(NAME) == "No logs found."
    await manager.load_plugin_async(meta())
    await manager.load_plugin_async(meta(), instance_id="second")
    await manager.execute_plugin_async(NAME, action="adjust.print", text="hello")
    await manager.execute_plugin_async("second", action="adjust.print", text="from the second")
    log = manager.get_plugin_logs(NAME)
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"
    assert re.search(
        rf"^--- Starting adjustable 1\.0 at {time} ---\n{time} [0-9a-f]{{32}} \| hello$", log, re.MULTILINE
    )
    assert "from the second" not in log
    await manager.unload_plugin_async("second")
    assert "from the second" in manager.get_plugin_logs("second")
    assert manager.get_plugin_logs("second", lines=1).endswith("| from the second")
    for file in (tmp_path / "data" / "logs").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="1 to 64"):
        manager.get_plugin_logs("../secrets/secrets")
    with pytest.raises(ValueError, match="at least 1"):
        manager.get_plugin_logs(NAME, lines=0)


async def test_what_a_plugin_prints_cannot_pass_for_another_line(manager: PluginManager, meta: MetaFactory) -> None:
    await manager.load_plugin_async(meta())
    forged = "x\r--- Starting adjustable 1.0 at noon ---\x1b[2K\u2028y\udc80\x00"
    await manager.execute_plugin_async(NAME, action="adjust.print", text=forged + "\n--- Starting evil ---")
    lines = manager.get_plugin_logs(NAME).split("\n")
    assert [line for line in lines if line.startswith("---")] == [lines[1]]
    assert all(line.isprintable() for line in lines)
    assert any(line.endswith("| --- Starting evil ---") for line in lines)


async def test_the_log_of_a_load_that_failed_is_there(manager: PluginManager, meta: MetaFactory) -> None:
    with pytest.raises(PluginError):
        await manager.load_plugin_async(meta("RaisesOnCreate"))
    assert "about to fail" in manager.get_plugin_logs(NAME)


# -- manifests of before


async def test_a_manifest_of_version_1_is_found_loaded_and_upgraded_when_written(
    manager: PluginManager, meta: MetaFactory, tmp_path: Path
) -> None:
    install, code = meta().manifest.install, meta().manifest.code
    flat = {
        "name": NAME,
        "version": "1.0",
        "description": "Old.",
        "module": code.module,
        "class": code.class_name,
        "interface": code.interface,
        "python_path": install.python_path,
        "source_paths": list(install.source_paths),
        "category": "Things",
        "db_path": None,
        "env_vars": {"REGION": "south"},
        "config_schema": SCHEMA,
        "worker_env": list(VARIABLES),
    }
    file = tmp_path / "data" / "manifests" / "old.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(flat))
    (file.parent / "wrong.json").write_text(json.dumps({**flat, "name": "other", "python_path": 3}))
    (found,) = manager.discover_manifests()
    assert [bad.reason for bad in manager.rejected_manifests] == ["install.python_path must be text, not 3"]
    assert (found.manifest.format_version, found.category) == ("1.0", "Things")
    await manager.load_plugin_async(found)
    assert await manager.execute_plugin_async(NAME, action="adjust.environment", name="REGION") == "south"
    loaded = manager.get_plugin_meta(NAME)
    assert loaded is not None
    assert not loaded.config_schema_drift
    write_manifest(file, found.manifest)
    (again,) = manager.discover_manifests()
    assert again.manifest == replace(found.manifest, format_version="2.0")
