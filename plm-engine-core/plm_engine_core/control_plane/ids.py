"""Identifiers made by the engine, never by the server."""

from __future__ import annotations

from uuid import UUID

import uuid_utils


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562, section 5.7): unique, and ordered by creation time to the millisecond."""
    return UUID(int=uuid_utils.uuid7().int)
