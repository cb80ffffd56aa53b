"""Why an embedded server cannot be used.

::

    PostgresUnavailable
    ├── ServerNotFound          no usable binaries: install or name some
    ├── ServerAccountMissing    nobody the server may run as: name an account
    ├── ServerVersionMismatch   the data belongs to another major version
    ├── LocationUnsuitable      a folder is missing a part, closed, or not ours
    └── ServerStartFailed       the server itself refused; its last words are in ``log_tail``
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_MESSAGE = re.compile(r"\b(LOG|ERROR|FATAL|PANIC|error):\s*(.*)")


class PostgresUnavailable(RuntimeError):
    """No embedded server can be offered; the message is one sentence that ends with the remedy."""


class ServerNotFound(PostgresUnavailable):
    """No server binaries of a wanted major version were found."""

    def __init__(self, wanted: str, remedy: str) -> None:
        super().__init__(f"no PostgreSQL server was found ({wanted}); {remedy}")
        self.wanted = wanted


class ServerAccountMissing(PostgresUnavailable):
    """PostgreSQL refuses to run as root or as a uid without a name, and no other account was found."""


class ServerVersionMismatch(PostgresUnavailable):
    """The data folder was made by a major version whose binaries are not at hand."""

    def __init__(self, cluster: Path, major: int, available: list[int]) -> None:
        super().__init__(
            f"the data in {cluster} belongs to PostgreSQL {major}, but only {available or 'none'} can be used; "
            f"install PostgreSQL {major}, or dump the data and start with a new folder"
        )
        self.cluster = cluster
        self.major = major
        self.available = available


class LocationUnsuitable(PostgresUnavailable):
    """A folder the server needs cannot be used as it stands."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = path


class ServerStartFailed(PostgresUnavailable):
    """A server command failed; ``log_tail`` holds the end of what it said, the message its last error."""

    def __init__(self, command: str, log_tail: str) -> None:
        remedy = "make room" if os.strerror(errno.ENOSPC) in log_tail else "correct what it names"
        super().__init__(f"PostgreSQL's {command} failed ({_last_words(log_tail)}); {remedy}, then start again")
        self.command = command
        self.log_tail = log_tail


def _last_words(log_tail: str) -> str:
    """The last error of a log and the message before it, which often says more, in one line and without dates."""
    lines = [line.strip() for line in log_tail.splitlines() if line.strip()]
    messages = [found.groups() for line in lines if (found := _MESSAGE.search(line))]
    errors = [number for number, (level, _) in enumerate(messages) if level != "LOG"]
    if not errors:
        return (lines or ["it said nothing"])[-1]
    return "; ".join(text for _, text in messages[max(errors[-1] - 1, 0) : errors[-1] + 1])
