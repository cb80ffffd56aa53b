"""What makes two emissions the same emission."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

from plm_shared.canonical_json import canonical_json

__all__ = ["IdempotencyKey", "compute_content_hash"]


@dataclass(frozen=True)
class IdempotencyKey:
    """Five texts in a fixed order. The first four name the logical row, the last its content.

    Writing the same key twice is a silent replay; the same first four with another content is a conflict.

    Raises:
        ValueError: a part is empty or holds U+0000, or one of the first four holds ``:``, which would let two
            different keys have the same text.
    """

    tenant_id: str
    trace_id: str
    span_id: str
    event_type: str
    content_hash: str

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if not isinstance(value, str) or not value or "\0" in value:
                raise ValueError(f"IdempotencyKey.{part.name} must be text, not empty and without U+0000: {value!r}")
            if ":" in value and part.name != "content_hash":
                raise ValueError(f"IdempotencyKey.{part.name} must not contain ':', which separates parts: {value!r}")

    def as_db_key(self) -> str:
        """The five parts joined by ``:``, as the ledger stores them."""
        return ":".join((self.tenant_id, self.trace_id, self.span_id, self.event_type, self.content_hash))


def compute_content_hash(payload: Any) -> str:
    """Lower-case hex SHA-256 of the payload's canonical JSON.

    Raises:
        JsonRefused: a value's text is not stable between processes; the message names its path.
    """
    return hashlib.sha256(canonical_json(payload).encode("utf-8")).hexdigest()
