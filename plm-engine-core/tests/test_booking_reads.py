"""What a booking reads does not grow with what was booked before, whenever its plans were made."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.postgres_only

CHAINS = 40
READS = """
    SELECT relname, sum(idx_tup_read)::bigint, sum(seq_tup_read)::bigint FROM (
        SELECT relid, sum(idx_tup_read) AS idx_tup_read FROM pg_stat_user_indexes GROUP BY relid) AS i
    JOIN pg_stat_user_tables USING (relid) WHERE relname = ANY (%s) GROUP BY relname
"""
TABLES = ["grants", "run_states", "run_steps", "budgets", "event_streams", "telemetry_events", "connector_calls"]
MOST = 12  # rows of one table in one chain; a reader of all rows of the tenant would read some 20 in each statement


async def test_a_chain_on_a_new_database_reads_the_rows_that_it_names(bench):
    for _ in range(5):
        await bench.lease()  # other runs of the tenant
    lease = await bench.lease()
    for step in range(CHAINS):
        grant = await bench.begun(lease, step_index=step, step_id=f"step {step}")
        await bench.settle(grant, lease)
    async with bench.storage.admission._gateway._pool.connection() as connection:
        await connection.execute("SELECT pg_stat_force_next_flush()")
    read = {name: by_index + by_scan for name, by_index, by_scan in bench.sql(READS, TABLES)}
    assert read.keys() == set(TABLES)
    assert {name: rows for name, rows in read.items() if rows > MOST * CHAINS} == {}
