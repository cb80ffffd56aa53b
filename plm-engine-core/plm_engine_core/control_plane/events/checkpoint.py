"""A checkpoint: one signed hash over all stream heads of a tenant at one instant, chained to the checkpoint before.

A copy of it outside the database, with the events it covers, makes every later change provable, even the removal of a
whole stream: nobody without the private key can make another tree that ends in the same root.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from uuid import UUID

from plm_engine_core.control_plane.events.merkle import tree_root
from plm_engine_core.control_plane.events.signing import PublicKeys, Signer

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DOMAIN = b"plm-events-checkpoint-v1"  # no other signature of this key can be taken for a checkpoint's


@dataclass(frozen=True, slots=True)
class Head:
    """How far a stream goes."""

    stream: str
    seq: int
    hash: bytes

    def leaf(self) -> bytes:
        """The head as a leaf of the tree."""
        name = self.stream.encode()
        return struct.pack(">i", len(name)) + name + struct.pack(">q", self.seq) + self.hash


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The `number`-th checkpoint of a tenant. `heads` are those that changed since the one before."""

    tenant_id: UUID
    number: int
    taken_at: datetime
    streams: int
    root: bytes
    previous: bytes
    key_id: str
    signature: bytes
    heads: tuple[Head, ...]

    def digest(self) -> bytes:
        """What the next checkpoint carries as `previous`."""
        return sha256(self.signed()).digest()

    def signed(self) -> bytes:
        """The bytes that `signature` is of."""
        return signed_bytes(self.tenant_id, self.number, self.taken_at, self.streams, self.root, self.previous)


def signed_bytes(tenant_id: UUID, number: int, taken_at: datetime, streams: int, root: bytes, previous: bytes) -> bytes:
    """What is signed: a fixed word, then numbers in 8 bytes big-endian and hashes after their length."""
    micros = (taken_at - _EPOCH) // timedelta(microseconds=1)
    return b"".join(
        (
            _DOMAIN,
            tenant_id.bytes,
            struct.pack(">qqq", number, micros, streams),
            struct.pack(">i", len(root)) + root,
            struct.pack(">i", len(previous)) + previous,
        )
    )


def root_of(heads: Iterable[Head]) -> bytes:
    """The root over all heads of a tenant, by stream name in the order of its UTF-8 bytes."""
    return tree_root([head.leaf() for head in sorted(heads, key=lambda head: head.stream.encode())])


def next_checkpoint(
    previous: Checkpoint | None,
    tenant_id: UUID,
    heads: Sequence[Head],
    changed: Sequence[Head],
    *,
    taken_at: datetime,
    signer: Signer,
) -> Checkpoint:
    """The checkpoint that follows `previous`, over all `heads`, of which `changed` are new since then."""
    number = previous.number + 1 if previous else 1
    link = previous.digest() if previous else b""
    root = root_of(heads)
    return Checkpoint(
        tenant_id=tenant_id,
        number=number,
        taken_at=taken_at,
        streams=len(heads),
        root=root,
        previous=link,
        key_id=signer.key_id,
        signature=signer.sign(signed_bytes(tenant_id, number, taken_at, len(heads), root, link)),
        heads=tuple(changed),
    )


def checkpoint_problem(
    checkpoint: Checkpoint, before: Checkpoint | None, heads: Mapping[str, Head], keys: PublicKeys
) -> str:
    """Why a checkpoint is not the next good one after `before`, given all `heads` it should cover; empty when it is."""
    expected = before.number + 1 if before else 1
    if checkpoint.number != expected:
        return f"checkpoint {expected} is missing; the next one is {checkpoint.number}"
    if checkpoint.previous != (before.digest() if before else b""):
        return "it does not continue the checkpoint before it"
    return root_problem(checkpoint, heads) or keys.problem(checkpoint.key_id, checkpoint.signature, checkpoint.signed())


def root_problem(checkpoint: Checkpoint, heads: Mapping[str, Head]) -> str:
    """Why a checkpoint does not stand for these heads; empty when it does."""
    if checkpoint.streams != len(heads) or checkpoint.root != root_of(heads.values()):
        return "its root is not that of the streams it covers"
    return ""
