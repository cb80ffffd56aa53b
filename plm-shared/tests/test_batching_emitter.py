"""The batching emitter: every acknowledged event is in the ledger once, however threads, forks and crashes fall."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from plm_shared import migrations
from plm_shared.addresses import DatabaseUrls
from plm_shared.async_kernel_emitter import AsyncKernelEmitter
from plm_shared.batching_emitter import BatchingKernelEmitter, EmitterClosed, QueueFull
from plm_shared.canonical_json import JsonRefused
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.idempotency import IdempotencyKey, compute_content_hash
from plm_shared.kernel_api import EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.ledger import IdempotencyConflict, KeyMismatch, UnknownRun, UnknownTenant
from plm_shared.provisioning import provision
from plm_shared.testing.databases import create_tenants

SOAK = float(os.environ.get("SOAK", "0.05"))
TRACE = "b" * 32


def telemetry(tenant: str, number: int, content: Any = None) -> EmitTelemetryArgs:
    payload = {"n": number, "content": content}
    span = f"{number:016x}"
    key = IdempotencyKey(tenant, TRACE, span, "step", compute_content_hash(payload))
    return EmitTelemetryArgs(event_type="step", span_id=span, capability="read", payload=payload, idempotency_key=key)


def llm(tenant: str, number: int, cost: str = "0.1") -> EmitLlmCallArgs:
    span = f"{number:016x}"
    return EmitLlmCallArgs(
        span_id=span,
        model="m",
        prompt_tokens=number,
        completion_tokens=1,
        pricing_version="overrides-static",
        cost_eur=cost,
        cost_status="calculated",
        idempotency_key=IdempotencyKey(tenant, TRACE, span, "llm", f"{number}/{cost}"),
    )


@pytest.fixture
def tenant(two_tenants: tuple[uuid.UUID, uuid.UUID]) -> str:
    return str(two_tenants[0])


@pytest.fixture
def make(kernel_database: DatabaseUrls, tenant: str) -> Iterator[Callable[..., BatchingKernelEmitter]]:
    made: list[BatchingKernelEmitter] = []

    def factory(**options: Any) -> BatchingKernelEmitter:
        made.append(BatchingKernelEmitter(tenant, dsn=kernel_database.app, **options))
        return made[-1]

    yield factory
    for emitter in made:
        emitter.close(10)


SPANS = {table: f"SELECT span_id FROM {table}".encode() for table in ("telemetry_events", "llm_calls")}  # noqa: S608 - ours


def spans(database: DatabaseUrls, table: str = "telemetry_events") -> list[int]:
    with psycopg.connect(database.admin) as connection:
        return sorted(int(span, 16) for (span,) in connection.execute(SPANS[table]))


def held_back(database: DatabaseUrls) -> psycopg.Connection[Any]:
    """Keeps every writer of telemetry waiting until it is closed."""
    connection = psycopg.connect(database.admin)
    connection.execute("LOCK TABLE telemetry_events IN EXCLUSIVE MODE")
    return connection


def test_an_acknowledged_event_is_committed(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str
) -> None:
    emitter = make()
    emitter.emit_telemetry(telemetry(tenant, 1))
    assert spans(kernel_database) == [1]


def test_the_snapshot_carries_the_rates_and_a_call_at_another_price_is_not_linked_to_it(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str
) -> None:
    rates = {"input_per_1k": "0.25", "output_per_1k": "1.5"}
    other = {"input_per_1k": "0.3", "output_per_1k": "1.5"}
    emitter = make()
    for number, price in enumerate((rates, other, rates, None)):
        args = EmitLlmCallArgs.model_validate({**llm(tenant, number).model_dump(), "rates": price})
        emitter.record_llm_call(args)
    with psycopg.connect(kernel_database.admin) as connection:
        found = connection.execute(
            "SELECT c.prompt_tokens, s.input_rate_per_1k::text, s.output_rate_per_1k::text FROM llm_calls AS c"
            " LEFT JOIN pricing_snapshots AS s ON s.id = c.pricing_snapshot_id ORDER BY 1"
        ).fetchall()
    price = ("0.25000000", "1.50000000")
    assert found == [(0, *price), (1, None, None), (2, *price), (3, *price)]


def test_a_bad_event_is_refused_alone_and_the_rest_of_its_batch_is_kept(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str
) -> None:
    emitter = make()
    emitter.emit_telemetry(telemetry(tenant, 7))
    blocker = held_back(kernel_database)
    handles = {number: emitter.submit(telemetry(tenant, number)) for number in range(100, 300)}
    conflict = emitter.submit(telemetry(tenant, 7, "other"))
    stray_run = uuid.uuid4()
    stray = emitter.submit(llm(tenant, 1), run_id=stray_run)
    calls = [emitter.submit(llm(tenant, number)) for number in range(2, 40)]
    blocker.close()
    for handle in (*handles.values(), *calls):
        handle.result(30)
    with pytest.raises(IdempotencyConflict):
        conflict.result(30)
    with pytest.raises(UnknownRun) as caught:
        stray.result(30)
    assert caught.value.run_id == str(stray_run)
    assert spans(kernel_database) == [7, *range(100, 300)]
    assert spans(kernel_database, "llm_calls") == list(range(2, 40))


def test_what_is_bad_by_itself_is_refused_before_it_is_queued(
    make: Callable[..., BatchingKernelEmitter], tenant: str
) -> None:
    emitter = make()
    good = telemetry(tenant, 1)
    with pytest.raises(KeyMismatch):
        emitter.submit(good.model_copy(update={"span_id": "other"}))
    with pytest.raises(JsonRefused) as caught:
        emitter.submit(good.model_copy(update={"payload": {"a": ["x\0"]}}))
    assert caught.value.path == "payload.a[0]"


def test_an_unknown_tenant_is_refused_for_each_event(kernel_database: DatabaseUrls) -> None:
    stranger = str(uuid.uuid4())
    with BatchingKernelEmitter(stranger, dsn=kernel_database.app) as emitter:
        handles = [emitter.submit(telemetry(stranger, number)) for number in range(5)]
        for handle in handles:
            with pytest.raises(UnknownTenant):
                handle.result(30)


def test_a_full_queue_makes_the_caller_wait_and_drops_nothing(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str
) -> None:
    emitter = make(most=2, capacity=4)
    blocker = held_back(kernel_database)
    handles = [emitter.submit(telemetry(tenant, number)) for number in range(4)]
    with pytest.raises(QueueFull):
        emitter.submit(telemetry(tenant, 4), wait=False)
    waiting = threading.Thread(target=lambda: handles.append(emitter.submit(telemetry(tenant, 5))))
    waiting.start()
    assert not handles[0].done
    blocker.close()
    waiting.join()
    assert emitter.flush(30)
    assert all(handle.done for handle in handles)
    assert spans(kernel_database) == [0, 1, 2, 3, 5]


def test_after_close_nothing_is_taken_and_everything_taken_is_written(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str
) -> None:
    emitter = make()
    for number in range(1000):
        emitter.submit(telemetry(tenant, number))
    assert emitter.close(30)
    assert len(spans(kernel_database)) == 1000
    with pytest.raises(EmitterClosed):
        emitter.submit(telemetry(tenant, 1))


def test_an_answer_that_does_not_come_in_time_is_a_timeout_and_the_event_stays(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str
) -> None:
    blocker = held_back(kernel_database)
    handle = make().submit(telemetry(tenant, 1))
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    blocker.close()
    handle.result(30)


def test_a_database_that_stays_away_is_reported_after_the_patience_ends(tmp_path: Path) -> None:
    tenant = str(uuid.uuid4())
    with BatchingKernelEmitter(tenant, dsn=f"postgresql://x@/x?host={tmp_path}", patience=0.05) as emitter:
        handle = emitter.submit(telemetry(tenant, 1))
        with pytest.raises(psycopg.OperationalError):
            handle.result(30)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"durability": "spool"}, "with a folder"),
        ({"durability": "disk"}, "'ack', or 'spool'"),
        ({"spool": "somewhere"}, "with a folder"),
        ({"most": 10, "capacity": 5}, "capacity=5"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BatchingKernelEmitter(str(uuid.uuid4()), dsn="postgresql://x", **options)


def test_without_an_address_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_DSN", raising=False)
    with pytest.raises(RuntimeError, match="PG_DSN is not set"):
        BatchingKernelEmitter(str(uuid.uuid4()))


def test_sixteen_threads_lose_nothing_and_write_nothing_twice(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str
) -> None:
    emitter = make(most=50, capacity=200)
    together = threading.Barrier(16)

    def work(place: int) -> None:
        together.wait()
        for number in range(place, 1600, 8):  # every number from two threads
            emitter.submit(telemetry(tenant, number))

    threads = [threading.Thread(target=work, args=(place % 8,)) for place in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    emitter.flush()
    assert spans(kernel_database) == list(range(1600))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("durability", ["ack", "spool"])
def test_after_a_fork_both_processes_go_on_and_each_writes_its_own(
    make: Callable[..., BatchingKernelEmitter],
    kernel_database: DatabaseUrls,
    tenant: str,
    durability: str,
    tmp_path: Path,
) -> None:
    emitter = make(durability=durability, **({"spool": tmp_path} if durability == "spool" else {}))
    emitter.emit_telemetry(telemetry(tenant, 1))
    emitter.drain()
    blocker = held_back(kernel_database)
    parents = emitter.submit(telemetry(tenant, 2))

    def go_on() -> bool:
        inherited = durability == "spool" or isinstance(outcome(parents.result), EmitterClosed)
        emitter.submit(telemetry(tenant, 3)).result(60)
        return inherited and emitter.drain(60) and emitter.close(60)

    child = child_of_a_fork(go_on)
    blocker.close()
    assert os.waitpid(child, 0)[1] == 0
    parents.result(30)
    emitter.emit_telemetry(telemetry(tenant, 4))
    assert emitter.drain(30)
    assert spans(kernel_database) == [1, 2, 3, 4]


def outcome(call: Callable[..., Any]) -> Exception | None:
    try:
        call(150)
    except Exception as error:  # noqa: BLE001 - the test asks which
        return error
    return None


async def test_coroutines_share_commits_and_a_full_queue_never_blocks_the_loop(
    kernel_database: DatabaseUrls, tenant: str
) -> None:
    async with AsyncKernelEmitter(tenant, dsn=kernel_database.app, most=5, capacity=10) as emitter:
        blocker = held_back(kernel_database)
        tasks = [asyncio.ensure_future(emitter.emit_telemetry(telemetry(tenant, number))) for number in range(100)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)
        blocker.close()
        await asyncio.gather(*tasks)
        with pytest.raises(IdempotencyConflict):
            await emitter.emit_telemetry(telemetry(tenant, 5, "other"))
        await emitter.record_llm_call(llm(tenant, 1))
        assert await emitter.flush()
        assert await emitter.drain()
    assert spans(kernel_database) == list(range(100))


def child_of_a_fork(work: Callable[[], bool]) -> int:
    """The pid of a child that ends with 0 when ``work`` was true there."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return child


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork_coroutines_go_on_and_wait_for_room_too(kernel_database: DatabaseUrls, tenant: str) -> None:
    emitter = AsyncKernelEmitter(tenant, dsn=kernel_database.app, most=2, capacity=2)

    async def emit(*numbers: int) -> None:
        await asyncio.gather(*(emitter.emit_telemetry(telemetry(tenant, number)) for number in numbers))

    asyncio.run(emit(*range(20)))  # more than there is room for: the thread that waits was started

    def go_on() -> bool:
        signal.alarm(60)  # a child that hangs must not outlive the test
        asyncio.run(emit(*range(20, 40)))
        return True

    child = child_of_a_fork(go_on)
    assert os.waitpid(child, 0)[1] == 0
    asyncio.run(emitter.close())
    assert spans(kernel_database) == list(range(40))


KILLED_EMITTER = """
import os, random, signal, sys, threading
sys.path.insert(0, sys.argv[1])
from test_batching_emitter import telemetry
from plm_shared.batching_emitter import BatchingKernelEmitter
_, _, dsn, tenant, first, durability, folder = sys.argv
options = {"spool": folder} if durability == "spool" else {}
emitter = BatchingKernelEmitter(tenant, dsn=dsn, durability=durability, most=20, **options)
out = os.dup(1)
def work(start):
    for number in range(start, start + 100_000, 4):
        emitter.submit(telemetry(tenant, number)).result()
        os.write(out, b"%d\\n" % number)
for start in range(4):
    threading.Thread(target=work, args=(int(first) + start,), daemon=True).start()
threading.Event().wait()
"""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("durability", ["ack", "spool"])
def test_a_killed_process_loses_nothing_it_acknowledged_and_a_replay_writes_nothing_twice(
    kernel_database: DatabaseUrls, tenant: str, durability: str, tmp_path: Path
) -> None:
    acknowledged: set[int] = set()
    rounds = max(3, int(100 * SOAK))
    for number in range(rounds):
        words = [
            str(Path(__file__).parent),
            kernel_database.app,
            tenant,
            str(number * 1_000_000),
            durability,
            str(tmp_path),
        ]
        emitting = subprocess.Popen([sys.executable, "-c", KILLED_EMITTER, *words], stdout=subprocess.PIPE)
        assert emitting.stdout is not None
        for _ in range(random.randrange(1, 400)):
            acknowledged.add(int(emitting.stdout.readline()))
        emitting.send_signal(signal.SIGKILL)
        acknowledged |= {int(line) for line in emitting.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")}
        emitting.stdout.close()
        emitting.wait()
    options = {"spool": tmp_path} if durability == "spool" else {}
    with BatchingKernelEmitter(tenant, dsn=kernel_database.app, durability=durability, **options) as emitter:  # type: ignore[arg-type]
        if durability == "spool":
            assert emitter.drain(60)
        assert acknowledged <= set(spans(kernel_database))
        for event in acknowledged:
            emitter.submit(telemetry(tenant, event))
    found = spans(kernel_database)
    assert acknowledged <= set(found)
    assert len(found) == len(set(found))
    if durability == "spool":
        assert not list(tmp_path.glob("*/*.spool"))


@pytest.mark.timeout(3600)
def test_a_killed_database_loses_nothing_that_was_acknowledged() -> None:
    folder = Path(tempfile.mkdtemp(prefix="plm-killed-"))  # the fixture's lies in a folder that others may close
    folder.chmod(0o711)
    server = EmbeddedPostgres(folder)  # durable: fsync is on
    server.start()
    try:
        urls = provision(server.admin_dsn, "killed")
        migrations.upgrade(urls.owner)
        tenant = str(create_tenants(urls, "t")[0])
        acknowledged: list[int] = []
        refused: list[Exception] = []
        ended = threading.Event()
        with BatchingKernelEmitter(tenant, dsn=urls.app, most=20, patience=120) as emitter:

            def work(start: int) -> None:
                number = start
                while not ended.is_set() and not refused:
                    if error := outcome(emitter.submit(telemetry(tenant, number)).result):
                        refused.append(error)
                    else:
                        acknowledged.append(number)
                    number += 4

            threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
            for thread in threads:
                thread.start()
            for _ in range(max(2, int(100 * SOAK))):
                until = len(acknowledged) + random.randrange(50, 300)
                with psycopg.connect(urls.admin) as watcher:
                    while len(acknowledged) < until and not refused:
                        watcher.execute("SELECT 1")
                postmaster = int((server.cluster_dir / "postmaster.pid").read_text().split("\n", 1)[0])
                os.kill(postmaster, signal.SIGKILL)
                server.start()
            ended.set()
            for thread in threads:
                thread.join()
        assert refused == []
        found = spans(urls)
        assert set(acknowledged) <= set(found)
        assert len(found) == len(set(found))
    finally:
        server.remove()


def test_a_spool_keeps_events_through_an_outage_and_a_later_start_writes_them_once(
    kernel_database: DatabaseUrls, tenant: str, tmp_path: Path
) -> None:
    nowhere = f"postgresql://x@/x?host={tmp_path}"
    emitter = BatchingKernelEmitter(tenant, dsn=nowhere, durability="spool", spool=tmp_path)
    for number in range(50):
        emitter.emit_telemetry(telemetry(tenant, number))
    assert not emitter.drain(0)
    emitter.close(1)
    assert spans(kernel_database) == []
    for _ in range(2):
        with BatchingKernelEmitter(tenant, dsn=kernel_database.app, durability="spool", spool=tmp_path) as later:
            assert later.drain(30)
    assert spans(kernel_database) == list(range(50))
    assert not list(tmp_path.glob("*/*.spool"))


def test_closing_while_the_database_is_away_leaves_the_spool_to_the_next_emitter_of_the_same_process(
    kernel_database: DatabaseUrls, tenant: str, tmp_path: Path
) -> None:
    nowhere = f"postgresql://x@/x?host={tmp_path}"
    emitter = BatchingKernelEmitter(tenant, dsn=nowhere, durability="spool", spool=tmp_path)
    emitter.emit_telemetry(telemetry(tenant, 1))
    emitter.close()
    with BatchingKernelEmitter(tenant, dsn=kernel_database.app, durability="spool", spool=tmp_path) as later:
        assert later.drain(30)
    assert spans(kernel_database) == [1]


def test_an_event_that_the_database_refuses_leaves_the_spool_with_its_reason(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str, tmp_path: Path
) -> None:
    emitter = make(durability="spool", spool=tmp_path)
    for content in (None, "other"):
        emitter.emit_telemetry(telemetry(tenant, 1, content))
    emitter.emit_telemetry(telemetry(tenant, 2))
    assert emitter.drain(30)
    (entry,) = [json.loads(line) for line in (tmp_path / tenant / "rejected.jsonl").read_text().splitlines()]
    assert entry["refusal"] == "IdempotencyConflict"
    assert entry["row"]["payload"] == {"n": 1, "content": "other"}
    assert spans(kernel_database) == [1, 2]


def test_a_disk_that_takes_no_refused_event_holds_the_spool_up_only_until_it_does(
    make: Callable[..., BatchingKernelEmitter], kernel_database: DatabaseUrls, tenant: str, tmp_path: Path
) -> None:
    in_the_way = tmp_path / tenant / "rejected.jsonl"
    in_the_way.mkdir(parents=True)
    emitter = make(durability="spool", spool=tmp_path)
    for number, content in ((1, None), (1, "other"), (2, None)):
        emitter.emit_telemetry(telemetry(tenant, number, content))
    assert not emitter.drain(0.5)
    in_the_way.rmdir()
    assert emitter.drain(30)
    assert len(in_the_way.read_text().splitlines()) == 1
    assert spans(kernel_database) == [1, 2]
