"""The PostgreSQL storage as one object."""

from __future__ import annotations

from psycopg import AsyncConnection
from psycopg.rows import DictRow, dict_row
from psycopg_pool import AsyncConnectionPool

from plm_engine_core.control_plane.storage.ports import Delivery
from plm_engine_core.control_plane.storage.postgres.admission import PostgresAdmission
from plm_engine_core.control_plane.storage.postgres.approvals import PostgresApprovals
from plm_engine_core.control_plane.storage.postgres.budgets import PostgresBudgets
from plm_engine_core.control_plane.storage.postgres.checkpoints import PostgresCheckpoints
from plm_engine_core.control_plane.storage.postgres.events import PostgresEvents
from plm_engine_core.control_plane.storage.postgres.gateway import Gateway, Pool
from plm_engine_core.control_plane.storage.postgres.halts import PostgresHalts
from plm_engine_core.control_plane.storage.postgres.idempotency import PostgresIdempotency
from plm_engine_core.control_plane.storage.postgres.policies import PostgresPolicies
from plm_engine_core.control_plane.storage.postgres.resource_leases import PostgresResourceLeases
from plm_engine_core.control_plane.storage.postgres.resource_locks import PostgresResourceLocks
from plm_engine_core.control_plane.storage.postgres.runs import PostgresRuns


def open_pool(
    dsn: str, *, min_size: int = 1, max_size: int = 10, timeout: float = 10.0, longest_idle: float = 10.0
) -> Pool:
    """A pool of autocommit connections that answer rows as dictionaries; open it with `await pool.open()`.

    `dsn` is a libpq connection string of the application role. A caller waits `timeout` seconds for a connection.
    What a process has locked when it is paused inside a transaction, it keeps from others for `longest_idle` seconds.
    Times that are written into texts are those of UTC, whatever the time zone of the server.
    """

    async def configured(connection: AsyncConnection[DictRow]) -> None:
        await connection.execute(
            "SELECT set_config('idle_in_transaction_session_timeout', %s, false), set_config('TimeZone', 'UTC', false)",
            [f"{longest_idle * 1000:.0f}ms"],
        )

    return AsyncConnectionPool(
        dsn,
        connection_class=AsyncConnection,
        kwargs={"autocommit": True, "row_factory": dict_row},
        configure=configured,
        min_size=min_size,
        max_size=max_size,
        timeout=timeout,
        # The pauses between its attempts double, so the default of minutes would keep callers from a server that is
        # back; after this long the next caller begins anew.
        reconnect_timeout=timeout,
        open=False,
    )


class PostgresStorage:
    """All ports over one pool."""

    def __init__(self, pool: Pool, delivery: Delivery) -> None:
        gateway = Gateway(pool)
        self.admission = PostgresAdmission(gateway)
        self.runs = PostgresRuns(gateway, delivery)
        self.approvals = PostgresApprovals(gateway, delivery)
        self.budgets = PostgresBudgets(gateway)
        self.halts = PostgresHalts(gateway, delivery)
        self.leases = PostgresResourceLeases(gateway)
        self.locks = PostgresResourceLocks(gateway)
        self.events = PostgresEvents(gateway)
        self.checkpoints = PostgresCheckpoints(gateway)
        self.policies = PostgresPolicies(gateway)
        self.idempotency = PostgresIdempotency(gateway)
