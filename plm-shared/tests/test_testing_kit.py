"""The fixtures that other packages build on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
from plm_shared.addresses import DatabaseUrls
from plm_shared.testing import databases
from plm_shared.testing.databases import ClusterPool, TemplateDatabases, create_tenants

KILLED_RUN = """
import os
from plm_shared.testing.databases import ClusterPool
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


def test_the_next_run_removes_the_cluster_of_a_killed_one() -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_RUN], capture_output=True, text=True, check=False)
    left_behind = Path(killed.stdout.strip())
    assert left_behind.parent == Path(tempfile.gettempdir())
    pid = int((left_behind / "cluster" / "postmaster.pid").read_text().split("\n")[0])
    long_ago = left_behind.stat().st_mtime - 2 * databases._SURELY_STARTED
    os.utime(left_behind, (long_ago, long_ago))
    ClusterPool().close()
    assert not left_behind.exists()
    assert not Path(f"/proc/{pid}/cwd").exists()
