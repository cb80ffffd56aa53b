"""A hash chain that is walked link by link: the one place that says when an event continues its stream."""

from __future__ import annotations

import struct
from hashlib import sha256
from uuid import UUID

Link = tuple[str, int, bytes, bytes, bytes, bytes, int, bytes]
"""An event: stream, sequence, previous hash, hash, kind, actor, microseconds since 1970 UTC, payload; UTF-8 texts."""

_LENGTH = struct.Struct(">i")
_SEQ_AND_LENGTH = struct.Struct(">qi")


class Chain:
    """One stream, as far as it was checked. Starts empty, or after an event that is known to be good."""

    __slots__ = ("_prefix", "hash", "seq")

    def __init__(self, tenant_id: UUID, stream: str, *, seq: int = 0, hash: bytes = b"") -> None:  # noqa: A002  # an event's own word
        self.seq = seq
        self.hash = hash
        self._prefix = chain_prefix(tenant_id, stream)

    def problem(
        self, seq: int, prev_hash: bytes, claimed: bytes, kind: bytes, actor: bytes, micros: int, payload: bytes
    ) -> str:
        """Go one event further; or say, in one sentence, why it does not continue the chain, and stay where it is.

        `claimed` is the hash the event carries, `micros` its time in microseconds since 1970 UTC; texts are UTF-8.
        """
        if seq != self.seq + 1:
            return f"event {self.seq + 1} is missing; the next one is {seq}"
        if prev_hash != self.hash:
            return "it does not continue the event before it"
        if link_hash(self._prefix, seq, prev_hash, kind, actor, micros, payload) != claimed:
            return "its content does not match its hash"
        self.seq = seq
        self.hash = claimed
        return ""


def link_hash(
    prefix: bytes, seq: int, prev_hash: bytes, kind: bytes, actor: bytes, micros: int, payload: bytes
) -> bytes:
    """SHA-256 over `prefix` (tenant and stream, each after its length) and the fields of one event.

    Fields, in order: sequence (8 bytes), previous hash, kind, actor, time (8 bytes), payload; all but the numbers are
    preceded by their length in 4 bytes, integers are big-endian. `storage/sql/common_v1.sql` computes the same.
    """
    return sha256(
        b"".join(
            (
                prefix,
                _SEQ_AND_LENGTH.pack(seq, len(prev_hash)),
                prev_hash,
                _LENGTH.pack(len(kind)),
                kind,
                _LENGTH.pack(len(actor)),
                actor,
                _SEQ_AND_LENGTH.pack(micros, len(payload)),
                payload,
            )
        )
    ).digest()


def chain_prefix(tenant_id: UUID, stream: str) -> bytes:
    """What every hash of a stream starts with."""
    return _text(str(tenant_id).encode()) + _text(stream.encode())


def _text(value: bytes) -> bytes:
    return _LENGTH.pack(len(value)) + value
