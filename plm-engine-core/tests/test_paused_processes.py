"""A process may be paused at any moment; what it has locked in the database then, nobody else can have."""

from __future__ import annotations

import psycopg
import pytest
from plm_engine_core.control_plane.storage.postgres.group_commit import Lane

pytestmark = pytest.mark.postgres_only


async def renew(bench, lease):
    beat = await bench.storage.runs.renew(bench.tenant, lease.run.id, fencing_token=lease.fencing_token, seconds=60)
    assert beat.held


async def admit(bench, lease):
    await bench.grant(lease)


async def admit_and_begin(bench, lease):
    await bench.control_plane.admit(bench.proposal(lease), begin=True)


async def begin(bench, lease):
    await bench.begin(await bench.grant(lease), lease)


async def settle(bench, lease):
    await bench.settle(await bench.begun(lease), lease)


@pytest.mark.parametrize("operation", [renew, admit, admit_and_begin, begin, settle], ids=lambda each: each.__name__)
async def test_whenever_a_process_has_its_answer_the_run_is_free(bench, monkeypatch, operation):
    lease = await bench.lease()
    free = []
    wait, read = psycopg.AsyncConnection.wait, Lane._on_readable

    def look():
        with psycopg.connect(bench.database.admin, autocommit=True) as other:
            rows = other.execute("SELECT FROM run_states WHERE run_id = %s FOR UPDATE SKIP LOCKED", [lease.run.id])
            free.append(len(rows.fetchall()))

    async def look_after(connection, *args, **kwargs):
        answer = await wait(connection, *args, **kwargs)
        look()
        return answer

    def look_after_reading(lane):
        read(lane)
        look()

    monkeypatch.setattr(psycopg.AsyncConnection, "wait", look_after)
    monkeypatch.setattr(Lane, "_on_readable", look_after_reading)
    await operation(bench, lease)
    assert free
    assert set(free) == {1}
