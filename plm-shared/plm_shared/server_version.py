"""Which PostgreSQL servers the platform works with."""

from __future__ import annotations

from typing import Final

__all__ = ["OLDEST_MAJOR", "ServerTooOld", "require_supported_server"]

OLDEST_MAJOR: Final = 15


class ServerTooOld(RuntimeError):
    """The server lacks what the schema is made of; nothing was sent to it."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"the server is PostgreSQL {version // 10000}.{version % 10000}, and {OLDEST_MAJOR} is the oldest that "
            "works; upgrade it, or name another server"
        )
        self.version = version


def require_supported_server(version: int) -> None:
    """Refuse a server that is too old, by the number it gives itself: 150004 is 15.4.

    Raises:
        ServerTooOld: its major version is below 15.
    """
    if version < OLDEST_MAJOR * 10000:
        raise ServerTooOld(version)
