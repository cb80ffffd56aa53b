"""How fast the ledger is written, beside a plain psycopg insert of the same row in the same run.

PostgreSQL with fsync and synchronous_commit on; the baseline of a rate is one thread's plain inserts a second.
"""

from __future__ import annotations

import configparser
import gc
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from figures import Figure, command_line, percentile, report
from plm_shared import db, migrations
from plm_shared.batching_emitter import Acknowledgement, BatchingKernelEmitter
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.idempotency import IdempotencyKey
from plm_shared.kernel_api import EmitLlmCallArgs, EmitTelemetryArgs
from plm_shared.provisioning import provision
from plm_shared.sqlalchemy_kernel_emitter import SqlAlchemyKernelEmitter
from server_log import recycle_the_log

MILLION = 1_000_000
EVENTS_PER_RUN = 100
THREADS = 8
OUTSTANDING = 64
SINGLE = 1500
WINDOWED = 60_000
WAITING = 12_000
SEGMENTS = 16  # of the server's log, 16 MB each: more than the figures with a target write
PAYLOAD = {"primitive": "lookup", "capability": "bom.read", "baseline_version": "7", "outcome": "found"}


def telemetry(tenant: str, number: int, *, run: uuid.UUID | None = None) -> EmitTelemetryArgs:
    span = f"{number:016x}"
    key = IdempotencyKey(tenant, "a" * 32, span, "knowledge_call", f"{number:064x}")
    payload = {**PAYLOAD, "run_id": str(run)} if run else PAYLOAD
    return EmitTelemetryArgs(
        event_type="knowledge_call", span_id=span, capability="read", payload=payload, idempotency_key=key
    )


def llm(tenant: str, number: int) -> EmitLlmCallArgs:
    span = f"{number:016x}"
    return EmitLlmCallArgs(
        span_id=span,
        model="m",
        prompt_tokens=100,
        completion_tokens=20,
        pricing_version="overrides-static",
        cost_eur=0.001,
        cost_status="calculated",
        idempotency_key=IdempotencyKey(tenant, "a" * 32, span, "llm_call", f"{number:064x}"),
    )


class Numbers:
    """Fresh numbers, so that no event of one measurement repeats another's."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> range:
        self._next += count
        return range(self._next - count, self._next)


def timed(calls: list[Callable[[], object]]) -> list[float]:
    samples = []
    for call in calls:
        began = time.perf_counter()
        call()
        samples.append(time.perf_counter() - began)
    return samples


def single(tenant: str, app: str, numbers: Numbers) -> dict[str, Figure]:
    """One thread, one event a transaction, in turns with a plain insert of the same row."""
    emitter = SqlAlchemyKernelEmitter(tenant)
    plain: list[float] = []
    ours: list[float] = []
    llm_calls: list[float] = []
    with psycopg.connect(app, autocommit=True) as connection:

        def insert(number: int) -> None:
            args = telemetry(tenant, number)
            with connection.transaction():
                connection.execute("SELECT set_config('app.tenant_id', %s, true)", [tenant])
                connection.execute(
                    "INSERT INTO telemetry_events (id, tenant_id, trace_id, span_id, event_type, capability, payload,"
                    " idempotency_key) VALUES (%s, %s, %s, %s, %s, %s, %s::jsonb, %s)",
                    [
                        uuid.uuid4(), tenant, "a" * 32, args.span_id, args.event_type, "read", "{}",
                        args.idempotency_key.as_db_key(),
                    ],
                )  # fmt: skip

        for _ in range(SINGLE // 50):
            plain += timed([lambda number=number: insert(number) for number in numbers.take(50)])  # type: ignore[misc]
            events = [telemetry(tenant, number) for number in numbers.take(50)]
            ours += timed([lambda args=args: emitter.emit_telemetry(args) for args in events])  # type: ignore[misc]
            calls = [llm(tenant, number) for number in numbers.take(50)]
            llm_calls += timed([lambda args=args: emitter.record_llm_call(args) for args in calls])  # type: ignore[misc]
    base, measured, call = (statistics.median(samples) * 1000 for samples in (plain, ours, llm_calls))
    return {
        "emit_telemetry, over a plain insert": Figure(
            value=measured - base, unit="ms", target=0.4, better="lower", baseline=base
        ),
        "record_llm_call, over a plain insert": Figure(value=call - base, unit="ms", better="lower", baseline=base),
    }


@contextmanager
def opened(tenant: str, app: str, spool: Path | None = None, **options: int) -> Iterator[BatchingKernelEmitter]:
    durability = "spool" if spool else "ack"
    with BatchingKernelEmitter(tenant, dsn=app, durability=durability, spool=spool, **options) as emitter:  # type: ignore[arg-type]
        yield emitter


def produce(
    emitter: BatchingKernelEmitter, events: list[EmitTelemetryArgs], outstanding: int
) -> tuple[float, list[float]]:
    """Events a second, and how long each took from submission to acknowledgement, with so many on their way."""
    latencies: list[list[float]] = [[] for _ in range(THREADS)]
    together = threading.Barrier(THREADS + 1)

    def work(place: int) -> None:
        mine = events[place::THREADS]
        window: deque[tuple[float, Acknowledgement]] = deque()
        measured = latencies[place]
        together.wait()
        for args in mine:
            if len(window) >= outstanding:
                began, handle = window.popleft()
                handle.result()
                measured.append(time.perf_counter() - began)
            window.append((time.perf_counter(), emitter.submit(args)))
        for began, handle in window:
            handle.result()
            measured.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(THREADS)]
    for thread in threads:
        thread.start()
    gc.collect()
    gc.freeze()
    together.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    gc.unfreeze()
    return len(events) / seconds, [sample for samples in latencies for sample in samples]


def batched(tenant: str, app: str, admin: str, numbers: Numbers, folder: Path, plain: float) -> dict[str, Figure]:
    figures = {}
    with opened(tenant, app) as emitter:
        produce(emitter, [telemetry(tenant, number) for number in numbers.take(5000)], OUTSTANDING)
        _, latencies = produce(emitter, [telemetry(tenant, number) for number in numbers.take(WINDOWED)], OUTSTANDING)
        figures["ack, 64 outstanding, p99 while the server's log grows"] = Figure(
            value=percentile(latencies, 0.99) * 1000, unit="ms", better="lower"
        )
        recycle_the_log(admin, SEGMENTS)
        # After a checkpoint the first change of a page is logged with all of it.
        produce(emitter, [telemetry(tenant, number) for number in numbers.take(5000)], OUTSTANDING)
        events = [telemetry(tenant, number) for number in numbers.take(WINDOWED)]
        rate, latencies = produce(emitter, events, OUTSTANDING)
        figures["ack, 64 outstanding"] = Figure(value=rate, unit="/s", target=10_000, better="higher", baseline=plain)
        figures["ack, 64 outstanding, p99"] = Figure(
            value=percentile(latencies, 0.99) * 1000, unit="ms", target=50, better="lower"
        )
        again, _ = produce(emitter, events, OUTSTANDING)
        figures["ack, replayed"] = Figure(value=again, unit="/s", target=rate, better="higher", baseline=rate)
        waiting = [telemetry(tenant, number) for number in numbers.take(WAITING)]
        rate, latencies = produce(emitter, waiting, 1)
        figures["ack, each waited for"] = Figure(value=rate, unit="/s", target=3000, better="higher", baseline=plain)
        figures["ack, each waited for, p99"] = Figure(
            value=percentile(latencies, 0.99) * 1000, unit="ms", target=10, better="lower"
        )
    with opened(tenant, app, spool=folder / "spool") as emitter:
        events = [telemetry(tenant, number) for number in numbers.take(WINDOWED)]
        rate, latencies = produce(emitter, events, OUTSTANDING)
        began = time.perf_counter()
        emitter.drain()
        figures["spool, accepted"] = Figure(value=rate, unit="/s", target=30_000, better="higher", baseline=plain)
        figures["spool, drained after"] = Figure(value=time.perf_counter() - began, unit="s", better="lower")
    with psycopg.connect(app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", [tenant])
        keys = [args.idempotency_key.as_db_key() for args in events]
        found = connection.execute(
            "SELECT count(*) FROM telemetry_events WHERE idempotency_key = ANY(%s)", [keys]
        ).fetchone()
        figures["spool, lost"] = Figure(
            value=len(keys) - (found[0] if found else 0), unit="events", target=0, better="lower"
        )
    return figures


def long_run(tenant: str, app: str, numbers: Numbers, count: int) -> dict[str, Figure]:
    """So many events over a hundredth as many runs: the rate of each tenth, and the memory before and after."""
    runs = [uuid.uuid4() for _ in range(max(100, count // EVENTS_PER_RUN))]
    with psycopg.connect(app) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT set_config('app.tenant_id', %s, true)", [tenant])
        cursor.execute(
            "INSERT INTO runs (id, tenant_id, actor_kind) SELECT unnest(%s::uuid[]), %s, 'agent'", [runs, tenant]
        )
    rates = []
    memory = []
    with opened(tenant, app) as emitter:
        for _ in range(10):
            began = time.perf_counter()
            for number in numbers.take(count // 10):
                emitter.submit(telemetry(tenant, number, run=runs[number % len(runs)]))
            emitter.flush()
            rates.append(count / 10 / (time.perf_counter() - began))
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    with psycopg.connect(app, autocommit=True) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, false)", [tenant])
        samples = timed(
            [
                lambda run=run: connection.execute("SELECT * FROM mcrc_v1_view WHERE run_id = %s", [run]).fetchone()  # type: ignore[misc]
                for run in runs[:200]
            ]
        )
    return {
        f"{count} events": Figure(value=count / sum(count / 10 / rate for rate in rates), unit="/s", better="higher"),
        "rate of the last tenth over the first": Figure(
            value=rates[-1] / rates[0], unit="", target=0.85, better="higher"
        ),
        "memory gained after the first tenth": Figure(
            value=memory[-1] - memory[0], unit="MB", target=16, better="lower"
        ),
        "mcrc_v1_view of one run, p99": Figure(
            value=percentile(samples, 0.99) * 1000, unit="ms", target=10, better="lower"
        ),
    }


CONTRACTS = Path(__file__).parents[1] / "plm-shared" / ".importlinter"


def base_modules() -> list[str]:
    """Every module that a contract keeps free of the extras."""
    contracts = configparser.ConfigParser()
    contracts.read(CONTRACTS)
    return contracts["importlinter:contract:drivers"]["source_modules"].split()


def import_time() -> dict[str, Figure]:
    """What a process pays for importing every module of the base install, beside starting at all; best of nine."""

    def started(code: str) -> float:
        command = [sys.executable, "-c", code]
        return min(timed([lambda: subprocess.run(command, check=True)] * 9)) * 1000

    bare = started("pass")
    full = started("import " + ", ".join(base_modules()))
    return {
        "import of the base install": Figure(value=full - bare, unit="ms", target=150, better="lower", baseline=bare)
    }


def main(count: int) -> dict[str, Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with EmbeddedPostgres(folder / "postgres") as server:
            urls = provision(server.admin_dsn, "bench")
            migrations.upgrade(urls.owner)
            tenant = str(uuid.uuid4())
            with psycopg.connect(urls.owner) as connection:
                connection.execute("INSERT INTO tenants (id, name) VALUES (%s, 'bench')", [tenant])
            os.environ["PG_DSN"] = urls.app
            numbers = Numbers()
            figures = single(tenant, urls.app, numbers)
            plain = 1000 / next(figure.baseline for figure in figures.values() if figure.baseline)
            figures |= batched(tenant, urls.app, server.admin_dsn, numbers, folder, plain)
            figures |= long_run(tenant, urls.app, numbers, count)
            figures |= import_time()
            db.reset_engine()
    return figures


if __name__ == "__main__":
    parser = command_line(__doc__ or "")
    share = float(os.environ.get("SOAK", "0.05"))
    parser.add_argument(
        "--events",
        type=int,
        default=int(MILLION * share),
        help="how many the long run emits (default: a million times SOAK, now %(default)s)",
    )
    asked = parser.parse_args()
    report("Writing the ledger", main(asked.events), as_json=asked.as_json)
