"""The W3C ``traceparent`` header: check, make, and carry it through a task.

Source: W3C Trace Context, section 3.2. Version ``ff`` is invalid; a version above 00 may carry further fields after
the flags, which are ignored.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar, Token
from typing import Final, NamedTuple

__all__ = [
    "Traceparent",
    "generate_traceparent",
    "get_traceparent",
    "is_valid_traceparent",
    "parse_or_generate_traceparent",
    "parse_traceparent",
    "reset_traceparent",
    "set_traceparent",
    "traceparent_extra_headers",
]

_SHAPE: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]*)?"
)
_current: ContextVar[str | None] = ContextVar("traceparent", default=None)


class Traceparent(NamedTuple):
    """The fields of a valid header."""

    trace_id: str
    span_id: str
    flags: str


def parse_traceparent(text: str) -> Traceparent | None:
    """The header's fields in lower case, or None when it is not valid."""
    match = _SHAPE.fullmatch(text.strip().lower())
    if match is None or (match[1] == "00" and match[5]):
        return None
    return Traceparent(match[2], match[3], match[4])


def is_valid_traceparent(text: str) -> bool:
    """Whether the text, in lower case, is a valid header."""
    return parse_traceparent(text) is not None


def generate_traceparent(*, sampled: bool = True) -> str:
    """A header for a new trace."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-{'01' if sampled else '00'}"


def parse_or_generate_traceparent(inbound: str | None) -> str:
    """The inbound header in lower case when it is valid, else a new one: a bad header never fails a request."""
    return inbound.strip().lower() if inbound and is_valid_traceparent(inbound) else generate_traceparent()


def set_traceparent(value: str) -> Token[str | None]:
    """Carry this header from here on; give the token back to ``reset_traceparent``."""
    return _current.set(value)


def reset_traceparent(token: Token[str | None]) -> None:
    """Undo ``set_traceparent``."""
    _current.reset(token)


def get_traceparent() -> str | None:
    """The header carried here, or None."""
    return _current.get()


def traceparent_extra_headers() -> dict[str, str]:
    """``{"traceparent": …}`` for an outbound call, or nothing."""
    value = _current.get()
    return {"traceparent": value} if value else {}
