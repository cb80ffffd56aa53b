"""Calls that are prepared by hand: whatever became of a statement that a connection had prepared, the call is made."""

from __future__ import annotations

import psycopg
import pytest
from plm_engine_core.control_plane.storage.postgres.calls import Calls
from plm_shared.sqlalchemy_kernel_emitter import Statement

pytestmark = pytest.mark.postgres_only

DOUBLE = Statement("SELECT to_json(2 * %(number)s::integer)", {"number": 21})


@pytest.fixture
async def connection(bench):
    async with await psycopg.AsyncConnection.connect(bench.database.app, autocommit=True) as connection:
        yield connection


async def test_a_statement_that_the_connection_forgot_is_prepared_again(connection):
    calls = Calls()
    assert await calls.run(connection, DOUBLE) == 42
    await connection.execute("DEALLOCATE ALL")
    assert await calls.run(connection, DOUBLE) == 42


async def test_a_statement_that_was_prepared_unheard_is_used(connection):
    assert await Calls().run(connection, DOUBLE) == 42
    assert await Calls().run(connection, DOUBLE) == 42


async def test_after_a_refusal_the_connection_goes_on(connection):
    calls = Calls()
    with pytest.raises(psycopg.errors.NumericValueOutOfRange):
        await calls.run(connection, Statement(DOUBLE.sql, {"number": 2**31 - 1}))
    assert await calls.run(connection, DOUBLE) == 42


async def test_a_text_that_the_database_cannot_hold_is_refused_before_it_is_sent(connection):
    calls = Calls()
    for value, error in (("4\0", psycopg.DataError), ("\ud800", UnicodeEncodeError)):
        with pytest.raises(error):
            await calls.run(connection, Statement(DOUBLE.sql, {"number": value}))
    assert await calls.run(connection, DOUBLE) == 42
