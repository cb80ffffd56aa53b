"""Where somebody outside the host looks at its jobs and asks for something: the file of jobs, and a bell beside it.

What is asked is a row, so it waits where no host runs; the bell is a pipe with a name, so a host that runs hears of it
at once, and who rings learns whether there is one.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from plugin_substrate.errors import StoreError
from plugin_substrate.queue.results import to_bytes
from plugin_substrate.stores.files import PASSAGE, make_private
from plugin_substrate.stores.job_writer import connect
from plugin_substrate.stores.jobs import LocalJobStore, set_up

#: How often somebody outside looks whether there is news: a host owes them no message.
LOOK_SECONDS = 0.1


class JobDesk:
    """Reads the jobs in ``path`` through ``store``, and asks for what only a host may do."""

    def __init__(self, path: Path) -> None:
        self.store = LocalJobStore(path)
        self.path = path

    def find(self, part: str) -> str:
        """Return the id of the one job whose id begins or ends so; a ValueError when there is none, or several."""
        statement = "SELECT id FROM jobs WHERE substr(id, 1, ?) = ? OR substr(id, -?) = ? LIMIT 2"
        found = self._rows(statement, *(len(part), part) * 2)
        if len(found) != 1 or not part:
            several = "several jobs begin or end with" if found else f"no job in {self.path} begins or ends with"
            raise ValueError(f"{several} {part!r}")
        return str(found[0][0])

    def ask(self, verb: str, arguments: Mapping[str, Any]) -> str:
        """Write a request and return its id."""
        request_id = uuid.uuid4().hex
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=PASSAGE)
            make_private(self.path, 0o600)
            if not self.path.exists():
                self.path.touch(mode=0o600)
            with closing(connect(self.path)) as connection:
                set_up(connection, self.path)
                connection.execute(
                    "INSERT INTO requests (id, verb, arguments) VALUES (?, ?, ?)",
                    (request_id, verb, to_bytes(dict(arguments), "arguments")),
                )
        return request_id

    def ring(self) -> bool:
        """Wake the host; False when none runs."""
        try:
            bell = os.open(self.path.with_name(self.path.name + ".bell"), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        try:
            os.write(bell, b"!")
        except BlockingIOError:
            pass  # it rings already
        finally:
            os.close(bell)
        return True

    def answer(self, request_id: str, seconds: float) -> dict[str, Any] | None:
        """Return what a host answered; None when none has within some seconds, or none runs any more."""
        deadline = time.monotonic() + seconds
        while True:
            found = self._rows("SELECT answer FROM requests WHERE id = ?", request_id)
            if found and found[0][0] is not None:
                answer: dict[str, Any] = json.loads(found[0][0])
                return answer
            if time.monotonic() >= deadline or not self.ring():
                return None
            time.sleep(LOOK_SECONDS / 4)

    def news(self) -> Iterator[None]:
        """Yield at once, and then whenever the file has changed."""
        version = None
        while True:
            (now,) = self._rows("PRAGMA data_version")[0] if self.path.exists() else (0,)
            if now != version:
                version = now
                yield
            else:
                time.sleep(LOOK_SECONDS)

    def _rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.store.select(statement, *values)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"nothing can be asked in {self.path}: {error}", path=str(self.path)) from error
