"""What makes two emissions the same emission."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from plm_shared.canonical_json import canonical_json, encodable

__all__ = ["LONGEST_KEY", "IdempotencyKey", "compute_content_hash"]

LONGEST_KEY: Final = 2000
"""Bytes of a key's text: PostgreSQL indexes hold no row of more than about 2 700."""


_PARTS: Final = ("tenant_id", "trace_id", "span_id", "event_type", "content_hash")


@dataclass(frozen=True)
class IdempotencyKey:
    """Five texts in a fixed order. The first four name the logical row, the last its content.

    Writing the same key twice is a silent replay; the same first four with another content is a conflict.

    Raises:
        ValueError: a part is empty or holds what PostgreSQL cannot store; one of the first four holds ``:``, which
            would let two different keys have the same text; or the whole is longer than ``LONGEST_KEY`` bytes.
    """

    tenant_id: str
    trace_id: str
    span_id: str
    event_type: str
    content_hash: str

    def __post_init__(self) -> None:
        parts = (self.tenant_id, self.trace_id, self.span_id, self.event_type, self.content_hash)
        if _in_order(parts):
            return
        for name, value in zip(_PARTS, parts, strict=True):
            if not isinstance(value, str) or not value or "\0" in value or not (value.isascii() or encodable(value)):
                raise ValueError(
                    f"IdempotencyKey.{name} must be text, not empty and without U+0000 or half a surrogate pair:"
                    f" {value!r}"
                )
            if ":" in value and name != "content_hash":
                raise ValueError(f"IdempotencyKey.{name} must not contain ':', which separates parts: {value!r}")
        if (length := len(self.as_db_key().encode())) > LONGEST_KEY:
            raise ValueError(f"IdempotencyKey is {length} bytes long; shorten its parts to {LONGEST_KEY} together")

    def as_db_key(self) -> str:
        """The five parts joined by ``:``, as the ledger stores them."""
        return ":".join((self.tenant_id, self.trace_id, self.span_id, self.event_type, self.content_hash))


def _in_order(parts: tuple[str, ...]) -> bool:
    """Whether nothing is wrong with the parts, as at a glance; what is not seen so may still be in order."""
    try:
        text = ":".join(parts)
    except TypeError:
        return False
    return text.isascii() and "\0" not in text and text.count(":") == 4 and all(parts) and len(text) <= LONGEST_KEY


def compute_content_hash(payload: Any) -> str:
    """Lower-case hex SHA-256 of the payload's canonical JSON.

    Raises:
        JsonRefused: a value's text is not stable between processes; the message names its path.
    """
    return hashlib.sha256(canonical_json(payload).encode("utf-8")).hexdigest()
