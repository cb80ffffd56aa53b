"""The fixtures that other packages build on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from plm_shared.addresses import DatabaseUrls
from plm_shared.idempotency import IdempotencyKey
from plm_shared.kernel_api import EmitLlmCallArgs
from plm_shared.testing import databases
from plm_shared.testing.clock import FrozenClock
from plm_shared.testing.databases import ClusterPool, TemplateDatabases, create_tenants
from plm_shared.testing.memory import InMemoryKernelEmitter

KILLED_RUN = """
import os
from plm_shared.testing import databases
from plm_shared.testing.databases import ClusterPool
databases._ROOM = BYTES
cluster = ClusterPool().cluster()
print(cluster.cluster_dir.parent, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_clone_holds_what_the_template_holds_and_changes_stay_in_it(template_databases: TemplateDatabases) -> None:
    prepared: list[DatabaseUrls] = []

    def prepare(database: DatabaseUrls) -> None:
        prepared.append(database)
        with psycopg.connect(database.owner) as connection:
            connection.execute("CREATE TABLE things (n int)")

    for _ in range(2):
        template = template_databases.template("things", prepare)
        with template_databases.cloned(template) as database, psycopg.connect(database.owner) as connection:
            assert connection.execute("SELECT count(*) FROM things").fetchone() == (0,)
            connection.execute("INSERT INTO things VALUES (1)")
            connection.commit()
    assert len(prepared) == 1


def test_only_owner_and_application_may_connect_to_a_clone(kernel_database: DatabaseUrls) -> None:
    with psycopg.connect(kernel_database.admin) as connection:
        allowed = connection.execute(
            "SELECT rolname FROM pg_roles WHERE NOT rolsuper AND rolname LIKE 'plm%'"
            " AND has_database_privilege(rolname, current_database(), 'CONNECT') ORDER BY 1"
        ).fetchall()
    assert allowed == [("plm_app",), ("plm_owner",)]


def test_tenants_are_created_in_order(kernel_database: DatabaseUrls) -> None:
    first, second = create_tenants(kernel_database, "a", "b")
    with psycopg.connect(kernel_database.owner) as connection:
        assert connection.execute("SELECT id, name FROM tenants ORDER BY name").fetchall() == [
            (first, "a"),
            (second, "b"),
        ]


@pytest.mark.parametrize("room", ["in memory", "on disk"])
def test_the_next_run_removes_the_cluster_of_a_killed_one(room: str) -> None:
    program = KILLED_RUN.replace("BYTES", "0" if room == "in memory" else str(1 << 62))
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    left_behind = Path(killed.stdout.strip())
    memory = Path("/dev/shm")  # noqa: S108 - a place, not a name that somebody else could take
    on_disk = room == "on disk" or not memory.is_dir()
    assert left_behind.parent == (Path(tempfile.gettempdir()) if on_disk else memory)
    pid = int((left_behind / "cluster" / "postmaster.pid").read_text().split("\n")[0])
    long_ago = left_behind.stat().st_mtime - 2 * databases._SURELY_STARTED
    os.utime(left_behind, (long_ago, long_ago))
    ClusterPool().close()
    assert not left_behind.exists()
    assert not Path(f"/proc/{pid}/cwd").exists()


def test_the_frozen_clock_moves_only_when_told_and_dates_the_snapshots(
    frozen_clock: FrozenClock, memory_emitter: InMemoryKernelEmitter
) -> None:
    def call(span: str) -> None:
        key = IdempotencyKey(memory_emitter.tenant_id, "t", span, "llm", "h")
        memory_emitter.record_llm_call(
            EmitLlmCallArgs(
                span_id=span,
                model="m",
                prompt_tokens=1,
                completion_tokens=1,
                pricing_version="overrides-static",
                cost_eur=1,
                cost_status="calculated",
                idempotency_key=key,
            )
        )

    call("a")
    frozen_clock.advance(timedelta(days=1))
    call("b")
    assert [row["snapshot_date"] for row in memory_emitter.rows] == ["2030-01-01", "2030-01-02"]
    assert frozen_clock() == datetime(2030, 1, 2, tzinfo=UTC)
    with pytest.raises(ValueError, match="backwards"):
        frozen_clock.advance(timedelta(seconds=-1))
    with pytest.raises(ValueError, match="aware"):
        FrozenClock(datetime(2030, 1, 1))  # noqa: DTZ001 - the point of the test


def test_the_second_tenant_sees_nothing_of_the_first(
    kernel_database: DatabaseUrls, two_tenants: tuple[uuid.UUID, uuid.UUID], second_tenant: uuid.UUID
) -> None:
    with psycopg.connect(kernel_database.app) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(two_tenants[0]),))
        connection.execute(
            "INSERT INTO runs (id, tenant_id, actor_kind) VALUES (gen_random_uuid(), %s, 'agent')", (two_tenants[0],)
        )
        connection.execute("SELECT set_config('app.tenant_id', %s, true)", (str(second_tenant),))
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (0,)
