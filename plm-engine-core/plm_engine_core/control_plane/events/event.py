"""An event: one link of a stream's hash chain."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event as stored. `payload` is the text that was hashed; `data` parses it."""

    tenant_id: UUID
    stream: str
    seq: int
    prev_hash: bytes
    hash: bytes
    kind: str
    actor: str
    occurred_at: datetime
    payload: str

    @property
    def data(self) -> dict[str, Any]:
        """The payload as a JSON object."""
        parsed: dict[str, Any] = json.loads(self.payload)
        return parsed


def run_stream(run_id: UUID) -> str:
    """The stream of one run."""
    return f"run/{run_id}"


TENANT_STREAM = "tenant"
"""The stream of everything in a tenant that belongs to no run."""


def event_hash(event: Event) -> bytes:
    """SHA-256 over the length-prefixed fields of an event and its predecessor's hash.

    Fields, in order: tenant, stream, sequence (8 bytes), previous hash, kind, actor, time in microseconds since 1970
    UTC (8 bytes), payload. Texts are UTF-8, each preceded by its length in 4 bytes; integers are big-endian.
    `storage/sql/common_v1.sql` computes the same.
    """
    micros = (event.occurred_at - _EPOCH) // (datetime.resolution)
    digest = hashlib.sha256()
    for part in (str(event.tenant_id).encode(), event.stream.encode()):
        digest.update(struct.pack(">i", len(part)) + part)
    digest.update(struct.pack(">q", event.seq))
    for part in (event.prev_hash, event.kind.encode(), event.actor.encode()):
        digest.update(struct.pack(">i", len(part)) + part)
    digest.update(struct.pack(">q", micros))
    payload = event.payload.encode()
    digest.update(struct.pack(">i", len(payload)) + payload)
    return digest.digest()
