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

from pathlib import Path


class PostgresUnavailable(RuntimeError):
    """No embedded server can be offered; the message ends with the remedy."""


class ServerNotFound(PostgresUnavailable):
    """No server binaries of a wanted major version were found."""

    def __init__(self, wanted: str, remedy: str) -> None:
        super().__init__(f"No PostgreSQL server found ({wanted}). {remedy}")
        self.wanted = wanted


class ServerAccountMissing(PostgresUnavailable):
    """PostgreSQL refuses to run as root or as a uid without a name, and no other account was found."""


class ServerVersionMismatch(PostgresUnavailable):
    """The data folder was made by a major version whose binaries are not at hand."""

    def __init__(self, cluster: Path, major: int, available: list[int]) -> None:
        super().__init__(
            f"The data in {cluster} belongs to PostgreSQL {major}, but only {available or 'none'} can be used. "
            f"Install PostgreSQL {major}, or dump the data and start with a new folder."
        )
        self.cluster = cluster
        self.major = major
        self.available = available


class LocationUnsuitable(PostgresUnavailable):
    """A folder the server needs cannot be used as it stands."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}. {remedy}")
        self.path = path


class ServerStartFailed(PostgresUnavailable):
    """A server command failed; ``log_tail`` holds the end of what it said."""

    def __init__(self, command: str, log_tail: str) -> None:
        super().__init__(
            f"PostgreSQL's {command} failed; its last words were: {log_tail.strip() or '(none)'}. "
            "Correct what it names and start again."
        )
        self.command = command
        self.log_tail = log_tail
