"""A hash chain that is walked link by link: the one place that says when an event continues its stream."""

from __future__ import annotations

import struct
from functools import lru_cache
from hashlib import sha256
from uuid import UUID

Link = tuple[str, int, bytes, bytes, bytes, int, bytes]
"""An event as it is hashed: stream, sequence, previous hash, hash, `framed` kind and actor, microseconds since 1970 UTC
and `framed` payload.

They are made by the hundred thousand, and what is framed comes from the database in one piece; hence a tuple.
"""

_LENGTH = struct.Struct(">i")
_SEQ_AND_LENGTH = struct.Struct(">qi")
_MICROS = struct.Struct(">q")


class Chain:
    """One stream, as far as it was checked. Starts empty, or after an event that is known to be good."""

    __slots__ = ("_prefix", "hash", "seq")

    def __init__(self, tenant_id: UUID, stream: str, *, seq: int = 0, hash: bytes = b"") -> None:  # noqa: A002  # an event's own word
        self.seq = seq
        self.hash = hash
        self._prefix = chain_prefix(tenant_id, stream)

    def problem(self, link: Link) -> str:
        """Go one event further; or say, in one sentence, why it does not continue the chain, and stay where it is."""
        _, seq, prev_hash, claimed, kind_and_actor, micros, payload = link
        if seq != self.seq + 1:
            return f"event {self.seq + 1} is missing; the next one is {seq}"
        if prev_hash != self.hash:
            return "it does not continue the event before it"
        try:
            matches = _hash(self._prefix, seq, prev_hash, kind_and_actor, micros, payload) == claimed
        except struct.error:  # a time or a sequence that no event can have
            matches = False
        if not matches:
            return "its content does not match its hash"
        self.seq = seq
        self.hash = claimed
        return ""


def link_hash(
    tenant_id: UUID, stream: str, seq: int, prev_hash: bytes, kind: str, actor: str, micros: int, payload: str
) -> bytes:
    """SHA-256 over tenant, stream and the fields of one event.

    Fields, in order: tenant, stream, sequence (8 bytes), previous hash, kind, actor, time (8 bytes), payload; all but
    the numbers are preceded by their length in 4 bytes, integers are big-endian, texts UTF-8.
    `storage/sql/common_v1.sql` computes the same.
    """
    return _hash(chain_prefix(tenant_id, stream), seq, prev_hash, framed(kind) + framed(actor), micros, framed(payload))


def chain_prefix(tenant_id: UUID, stream: str) -> bytes:
    """What every hash of a stream starts with."""
    return framed(str(tenant_id)) + framed(stream)


@lru_cache(maxsize=1024)
def framed_names(kind: str, actor: str) -> bytes:
    """Kind and actor of an event, each `framed`; a few of them name most events of a history."""
    return framed(kind) + framed(actor)


def framed(text: str) -> bytes:
    """A text in UTF-8 after its length in 4 bytes."""
    value = text.encode()
    return _LENGTH.pack(len(value)) + value


def unframed(frames: bytes) -> list[str]:
    """The texts of frames that follow each other."""
    texts, at = [], 0
    while at < len(frames):
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(frames, at)[0]
        texts.append(frames[start:at].decode())
    return texts


def _hash(prefix: bytes, seq: int, prev_hash: bytes, kind_and_actor: bytes, micros: int, payload: bytes) -> bytes:
    return sha256(
        b"".join(
            (
                prefix,
                _SEQ_AND_LENGTH.pack(seq, len(prev_hash)),
                prev_hash,
                kind_and_actor,
                _MICROS.pack(micros),
                payload,
            )
        )
    ).digest()
