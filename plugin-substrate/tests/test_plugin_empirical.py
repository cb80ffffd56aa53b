"""What calls took is kept, folded together, in every form of the store alike, and never at the cost of a call."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import CallContext, PluginError, PluginManager, PluginMeta
from plugin_substrate.errors import StoreError
from plugin_substrate.interface import MAX_USAGE_UNITS
from plugin_substrate.stores.empirical import (
    MAX_USAGE_TOTALS,
    EmpiricalResourceRecord,
    EmpiricalResourceStore,
    InMemoryEmpiricalResourceStore,
    LocalEmpiricalResourceStore,
    ResourceSample,
    compute_config_hash,
)

MetaFactory = Callable[..., PluginMeta]

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SAMPLE = ResourceSample(
    plugin_name="reader",
    instance_id="reader",
    config_hash="sha256:0",
    success=True,
    duration_seconds=1.0,
    cpu_percent=50.0,
    memory_mb_peak=100.0,
    api_usage={"page": 2.0},
    observed_at=NOW,
)
OTHER = replace(
    SAMPLE, success=False, duration_seconds=3.0, cpu_percent=None, memory_mb_peak=300.0, api_usage={"page": 1}
)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> EmpiricalResourceStore:
    return (
        InMemoryEmpiricalResourceStore()
        if request.param == "memory"
        else LocalEmpiricalResourceStore(tmp_path / "e" / "empirical.db")
    )


# -- any form


def test_samples_fold_into_means_maxima_and_sums(store: EmpiricalResourceStore) -> None:
    assert store.get("reader", "sha256:0") is None
    store.add([EmpiricalResourceRecord.of(SAMPLE)])
    store.add([EmpiricalResourceRecord.of(OTHER, SAMPLE)])
    record = store.get("reader", "sha256:0")
    assert record is not None
    assert (record.sample_count, record.success_count, record.success_rate) == (3, 2, pytest.approx(2 / 3))
    assert record.duration_seconds_mean == pytest.approx(5 / 3)
    assert (record.memory_mb_peak_max, record.memory_mb_peak_mean) == (300.0, pytest.approx(500 / 3))
    assert record.api_usage_totals == {"page": 5.0}
    assert record.last_observed == NOW


def test_a_figure_that_nobody_gave_is_no_zero(store: EmpiricalResourceStore) -> None:
    store.add([EmpiricalResourceRecord.of(SAMPLE, OTHER)])
    record = store.get("reader", "sha256:0")
    assert record is not None
    assert (record.cpu_samples, record.cpu_percent_mean) == (1, 50.0)
    assert (record.gpu_samples, record.gpu_memory_mb_peak_mean, record.gpu_memory_mb_peak_max) == (0, None, None)


def test_configurations_and_instances_are_kept_apart(store: EmpiricalResourceStore) -> None:
    keys = [("b", "sha256:0"), ("a", "sha256:1"), ("a", "sha256:0")]
    store.add([EmpiricalResourceRecord.of(replace(SAMPLE, instance_id=one, config_hash=two)) for one, two in keys])
    assert [(record.instance_id, record.config_hash) for record in store.list_all()] == sorted(keys)


def test_what_plugins_report_as_used_is_bounded_whatever_they_say(store: EmpiricalResourceStore) -> None:
    """A plugin names the units: neither their sums nor their number may cost others their records."""
    most = sys.float_info.max
    other = replace(SAMPLE, instance_id="other")
    for number in range(3 * MAX_USAGE_TOTALS // MAX_USAGE_UNITS):
        units = {f"{number}-{unit}": 1.0 for unit in range(MAX_USAGE_UNITS - 1)}
        greedy = replace(SAMPLE, api_usage={"page": most, **units})
        store.add([EmpiricalResourceRecord.of(greedy, greedy), EmpiricalResourceRecord.of(other)])
    record, beside = store.get("reader", "sha256:0"), store.get("other", "sha256:0")
    assert record is not None
    assert beside is not None
    assert record.api_usage_totals["page"] == most
    assert record.api_usage_totals["0-0"] == 2.0
    assert len(record.api_usage_totals) == MAX_USAGE_TOTALS
    assert beside.sample_count == 3 * MAX_USAGE_TOTALS // MAX_USAGE_UNITS


async def test_the_sums_of_a_plugin_that_reports_impossible_usage_hold_up_no_others(
    manager: PluginManager, probe_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(probe_meta("Spender", "spender", "spender"))
    await manager.load_plugin_async(probe_meta())
    for number in range(3):
        await manager.execute_plugin_async("spender", number)
        await manager.execute_plugin_async("probe", action="probe.echo")
        records = {record.instance_id: record for record in await manager.get_empirical_records_async()}
    assert (records["probe"].sample_count, records["spender"].sample_count) == (3, 3)
    assert records["spender"].api_usage_totals["money"] == sys.float_info.max


def test_no_configuration_has_the_digest_of_an_empty_one() -> None:
    assert compute_config_hash(None) == compute_config_hash({}) != compute_config_hash({"depth": 1})


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e6), st.none() | st.floats(0, 1e6)), min_size=1), st.data())
def test_folding_in_any_parts_is_folding_at_once(shapes: list[tuple[bool, float, float | None]], data: Any) -> None:
    samples = [
        replace(SAMPLE, success=success, duration_seconds=seconds, memory_mb_peak=peak)
        for success, seconds, peak in shapes
    ]
    cut = data.draw(st.integers(0, len(samples)))
    whole = EmpiricalResourceRecord.of(*samples)
    parts = [EmpiricalResourceRecord.of(*part) for part in (samples[:cut], samples[cut:]) if part]
    folded = parts[0].combined(parts[1]) if len(parts) > 1 else parts[0]
    assert (folded.sample_count, folded.success_count) == (whole.sample_count, whole.success_count)
    assert folded.memory_mb_peak_max == whole.memory_mb_peak_max
    assert folded.duration_seconds_mean == pytest.approx(whole.duration_seconds_mean)
    assert folded.memory_mb_peak_mean == pytest.approx(whole.memory_mb_peak_mean)


# -- the file


@pytest.fixture
def file(tmp_path: Path) -> LocalEmpiricalResourceStore:
    return LocalEmpiricalResourceStore(tmp_path / "empirical.db")


def test_hosts_that_write_at_once_lose_nothing(tmp_path: Path, file: LocalEmpiricalResourceStore) -> None:
    stores = [LocalEmpiricalResourceStore(tmp_path / "empirical.db") for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda each: [each.add([EmpiricalResourceRecord.of(SAMPLE)]) for _ in range(10)], stores))
    record = file.get("reader", "sha256:0")
    assert record is not None
    assert (record.sample_count, record.api_usage_totals["page"]) == (40, 80.0)


def test_reading_makes_no_file_and_writing_one_that_only_the_host_may_read(
    tmp_path: Path, file: LocalEmpiricalResourceStore
) -> None:
    assert file.list_all() == []
    assert not (tmp_path / "empirical.db").exists()
    file.add([EmpiricalResourceRecord.of(SAMPLE)])
    assert stat.S_IMODE((tmp_path / "empirical.db").stat().st_mode) == 0o600
    with sqlite3.connect(tmp_path / "empirical.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_of_before_usage_was_kept_is_added_to_in_place(
    tmp_path: Path, file: LocalEmpiricalResourceStore
) -> None:
    with sqlite3.connect(tmp_path / "empirical.db") as connection:
        connection.execute(
            "CREATE TABLE empirical_resources (instance_id TEXT, config_hash TEXT, plugin_name TEXT, "
            "sample_count INTEGER, success_count INTEGER, cpu_percent_mean REAL, memory_mb_peak_max REAL, "
            "memory_mb_peak_mean REAL, gpu_memory_mb_peak_max REAL, gpu_memory_mb_peak_mean REAL, "
            "duration_seconds_mean REAL, last_observed TEXT, PRIMARY KEY (instance_id, config_hash))"
        )
        row = ("reader", "sha256:0", "reader", 3, 3, 20.0, 100.0, 100.0, None, None, 1.0, NOW.isoformat())
        connection.execute(f"INSERT INTO empirical_resources VALUES ({', '.join('?' * len(row))})", row)  # noqa: S608
    file.add([EmpiricalResourceRecord.of(replace(SAMPLE, memory_mb_peak=500.0))])
    record = file.get("reader", "sha256:0")
    assert record is not None
    assert (record.sample_count, record.memory_mb_peak_mean) == (4, 200.0)
    assert record.api_usage_totals == {"page": 2.0}


def test_a_file_that_is_no_database_is_named(tmp_path: Path, file: LocalEmpiricalResourceStore) -> None:
    (tmp_path / "empirical.db").write_text("no database" * 100)
    with pytest.raises(StoreError, match=r"empirical\.db"):
        file.add([EmpiricalResourceRecord.of(SAMPLE)])


# -- through the manager


@pytest.fixture
async def eater(tmp_path: Path, probe_meta: Any) -> AsyncIterator[PluginManager]:
    async with PluginManager(data_dir=tmp_path, grace_seconds=0.3) as manager:
        await manager.load_plugin_async(probe_meta("Eater", "eater", "eater"))
        yield manager


async def test_every_unary_call_is_recorded_whether_it_succeeds_or_not(eater: PluginManager) -> None:
    await eater.execute_plugin_async("eater", action="eater.usage", pages=2)
    await eater.execute_plugin_async("eater", action="eater.usage", pages=3, call=CallContext("c", "tenant"))
    with pytest.raises(PluginError):
        await eater.execute_plugin_async("eater", action="eater.usage", pages=1, fail=True)
    (record,) = await eater.get_empirical_records_async("eater")
    assert (record.plugin_name, record.sample_count, record.success_count) == ("eater", 3, 2)
    assert record.api_usage_totals == {"pages": 6}
    assert record.cpu_samples == record.memory_samples == 3
    assert await eater.get_empirical_records_async("another") == []


async def test_a_peak_within_the_call_is_recorded_though_it_is_over_at_the_end(eater: PluginManager) -> None:
    await eater.execute_plugin_async("eater", action="eater.taste", mb=80)
    (record,) = await eater.get_empirical_records_async()
    assert record.memory_mb_peak_max is not None
    assert record.memory_mb_peak_max > 80
    assert (await eater.get_plugin_stats_async("eater")).memory_rss_mb < 80


async def test_a_call_that_was_never_sent_is_no_sample(eater: PluginManager) -> None:
    async def no() -> bool:
        return False

    with pytest.raises(PluginError):
        await eater.execute_call("eater", action="eater.usage", pages=1, before_start=no)
    assert await eater.get_empirical_records_async() == []


async def test_what_was_recorded_is_there_for_the_next_host(tmp_path: Path, probe_meta: Any) -> None:
    for expected in (1, 2):
        async with PluginManager(data_dir=tmp_path) as manager:
            await manager.load_plugin_async(probe_meta("Eater", "eater", "eater"))
            await manager.execute_plugin_async("eater", action="eater.usage", pages=1)
        store = LocalEmpiricalResourceStore(tmp_path / "empirical_resources.db")
        assert [record.sample_count for record in store.list_all()] == [expected]


class _Stuck(InMemoryEmpiricalResourceStore):
    """A store whose writes do not end before they may."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = threading.Event()
        self.may_end = threading.Event()

    def add(self, records: Any) -> None:
        self.writing.set()
        self.may_end.wait(30)
        super().add(records)


async def test_no_call_waits_for_a_store_that_does_not_answer(tmp_path: Path, probe_meta: Any) -> None:
    store = _Stuck()
    async with PluginManager(data_dir=tmp_path, empirical_store=store) as manager:
        await manager.load_plugin_async(probe_meta("Eater", "eater", "eater"))
        await manager.execute_plugin_async("eater", action="eater.usage", pages=1)
        assert await asyncio.to_thread(store.writing.wait, 30)
        for _ in range(50):
            await manager.execute_plugin_async("eater", action="eater.usage", pages=1)
        assert store.list_all() == []
        store.may_end.set()
        (record,) = await manager.get_empirical_records_async()
        assert record.sample_count == 51


async def test_a_store_that_fails_costs_samples_and_is_said_once(
    tmp_path: Path, probe_meta: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empirical_resources.db").mkdir()
    async with PluginManager(data_dir=tmp_path) as manager:
        await manager.load_plugin_async(probe_meta("Eater", "eater", "eater"))
        for _ in range(3):
            assert await manager.execute_plugin_async("eater", action="eater.usage", pages=1) == 1
            with pytest.raises(StoreError):
                await manager.get_empirical_records_async()
    assert caplog.text.count("is not recorded") == 1


async def test_tracking_can_be_switched_off(tmp_path: Path, probe_meta: Any) -> None:
    async with PluginManager(data_dir=tmp_path, empirical_tracking=False) as manager:
        await manager.load_plugin_async(probe_meta("Eater", "eater", "eater"))
        await manager.execute_plugin_async("eater", action="eater.usage", pages=1)
        assert await manager.get_empirical_records_async() == []
    assert not (tmp_path / "empirical_resources.db").exists()
