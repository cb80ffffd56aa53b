"""What the record costs: appending, replaying, verifying, exporting and checkpointing events.

PostgreSQL is real, with fsync on, row-level security and the application's role. BENCH_EVENTS sets the length of the
chain that is replayed and verified.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from figures import Figure, percentile
from plm_backend.database import upgrade_all
from plm_engine_core.control_plane.events import PublicKeys, Signer, export, read_exports, verify_tenant
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision

EVENTS = int(os.environ.get("BENCH_EVENTS", "100000"))
STREAMS = 2000
APPENDS = 300
AGAIN = 5  # a long walk is made, and the middle one told: others use the machine too
BATCH = 200  # appended in one transaction while the chain is made
STREAM = f"run/{uuid.UUID(int=7)}"
APPEND = "SELECT engine_append_event_v1(%s, %s, 'step_granted', 'human:bench', %s)"
PAYLOAD = json.dumps({"step": 1, "capability": "bench.plain", "answer": {"status": "granted"}, "digest": "a" * 64})
ROWS = "CREATE TABLE bench_events (tenant_id uuid NOT NULL, id bigint NOT NULL, PRIMARY KEY (tenant_id, id))"


class NoDelivery:
    """Nothing is driven here."""

    async def enqueue(
        self, connection: Any, tenant_id: uuid.UUID, run_id: uuid.UUID, *, after_seconds: float = 0.0
    ) -> None:
        pass


async def recording(folder: Path) -> dict[str, Figure]:
    """All figures about events, on a server of their own."""
    with EmbeddedPostgres(folder / "events") as server:
        urls = provision(server.admin_dsn, "bench_events")
        upgrade_all(urls.owner)
        tenants = [uuid.uuid4() for _ in range(3)]
        with psycopg.connect(urls.owner) as owner:
            for number, tenant in enumerate(tenants):
                owner.execute("INSERT INTO tenants (id, name) VALUES (%s, %s)", [tenant, f"events-{number}"])
            owner.execute(ROWS)
            owner.execute("GRANT INSERT ON bench_events TO plm_engine_writer")
        one, long, wide = tenants
        adds = _append_adds(urls.app, one)
        _fill(urls.app, long, [STREAM] * EVENTS)
        _fill(urls.app, wide, [f"run/{uuid.uuid4()}" for _ in range(STREAMS)])
        async with open_pool(urls.app, max_size=4) as pool:
            storage = PostgresStorage(pool, NoDelivery())
            figures = {**await _reading(storage, long), **await _checking(storage, long)}
            figures |= await _checkpoints(storage, urls.app, wide)
    added = Figure(value=adds, unit="ms", better="lower", target=0.6)
    return {"event append in a caller's transaction adds, p50": added, **figures}


def _append_adds(app: str, tenant: uuid.UUID) -> float:
    """Milliseconds that an event adds to a transaction of one row, the two kinds of transaction taking turns."""
    plain: list[float] = []
    with_event: list[float] = []
    with psycopg.connect(app, autocommit=True) as connection:
        for number in range(2 * APPENDS):
            started = time.perf_counter()
            with connection.transaction():
                connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(tenant)])
                connection.execute("INSERT INTO bench_events VALUES (%s, %s)", [tenant, number])
                if number % 2:
                    connection.execute(APPEND, [tenant, STREAM, PAYLOAD])
            (with_event if number % 2 else plain).append((time.perf_counter() - started) * 1e3)
    return percentile(with_event, 0.5) - percentile(plain, 0.5)


def _fill(app: str, tenant: uuid.UUID, streams: list[str]) -> None:
    with psycopg.connect(app) as connection:
        connection.execute("SET synchronous_commit = off")
        for at in range(0, len(streams), BATCH):
            connection.execute("SELECT set_config('app.tenant_id', %s, true)", [str(tenant)])
            with connection.cursor() as cursor:
                cursor.executemany(APPEND, [[tenant, stream, PAYLOAD] for stream in streams[at : at + BATCH]])
            connection.commit()


async def _reading(storage: PostgresStorage, tenant: uuid.UUID) -> dict[str, Figure]:
    walks = []
    for _ in range(AGAIN):
        started, after = time.perf_counter(), 0
        while page := await storage.events.read(tenant, STREAM, after=after, limit=5000):
            after = page[-1].seq
        walks.append((time.perf_counter() - started) * 1e3 * 100_000 / after)
    samples = []
    for _ in range(APPENDS):
        started = time.perf_counter()
        assert len(await storage.events.read(tenant, STREAM, after=after - 10, limit=10)) == 10
        samples.append((time.perf_counter() - started) * 1e3)
    return {
        "replay of 100 000 events": Figure(value=percentile(walks, 0.5), unit="ms", better="lower", target=1500),
        "last 10 events, p50": Figure(value=percentile(samples, 0.5), unit="ms", better="lower", target=1),
    }


async def _checking(storage: PostgresStorage, tenant: uuid.UUID) -> dict[str, Figure]:
    key = Ed25519PrivateKey.generate()
    await Checkpointer(storage.checkpoints, Signer(key)).take(tenant)
    database, exported = [], []
    for _ in range(AGAIN):
        started = time.perf_counter()
        (result,) = await verify_tenant(storage, tenant)
        database.append(result.events / (time.perf_counter() - started))
        assert result.consistent
    file = BytesIO()
    await export(storage.checkpoints, tenant, file)
    keys = PublicKeys([key.public_key()])
    for _ in range(AGAIN):
        file.seek(0)
        started = time.perf_counter()
        found = read_exports([file], keys)
        exported.append(found.events / (time.perf_counter() - started))
        assert found.unforged
    return {
        "verify a chain from the database": Figure(
            value=percentile(database, 0.5), unit="/s", better="higher", target=200_000
        ),
        "verify a chain from an export": Figure(
            value=percentile(exported, 0.5), unit="/s", better="higher", target=200_000
        ),
    }


async def _checkpoints(storage: PostgresStorage, app: str, tenant: uuid.UUID) -> dict[str, Figure]:
    checkpointer = Checkpointer(storage.checkpoints, Signer(Ed25519PrivateKey.generate()))

    async def taken(prepare: Callable[[], None]) -> float:
        prepare()
        started = time.perf_counter()
        assert await checkpointer.take(tenant) is not None
        return (time.perf_counter() - started) * 1e3

    first = await taken(lambda: None)
    later = [await taken(lambda: _fill(app, tenant, ["tenant"])) for _ in range(20)]
    return {
        f"checkpoint of {STREAMS} streams, all new": Figure(value=first, unit="ms", better="lower"),
        f"checkpoint of {STREAMS} streams, one changed, p50": Figure(
            value=percentile(later, 0.5), unit="ms", better="lower"
        ),
    }
