"""PostgreSQL behind the ports: bare psycopg connections, row-level security, short functions for the hot path."""

from plm_engine_core.control_plane.storage.postgres.storage import PostgresStorage, open_pool

__all__ = ["PostgresStorage", "open_pool"]
