"""The root of a Merkle tree: one hash that stands for all stream heads of a tenant (RFC 6962, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The tree hash of `leaves`, in their order; of no leaves it is the SHA-256 of nothing.

    Leaves and inner nodes are hashed with different first bytes, so that neither can be passed off as the other.
    """
    if not leaves:
        return sha256().digest()
    level = [sha256(b"\x00" + leaf).digest() for leaf in leaves]
    while len(level) > 1:
        # Splitting at the largest power of two, as the RFC does, is the same as pairing from the left and carrying a
        # last odd node up unchanged.
        paired = [sha256(b"\x01" + level[at] + level[at + 1]).digest() for at in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    return level[0]
