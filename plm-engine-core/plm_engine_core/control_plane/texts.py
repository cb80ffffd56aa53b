"""What may be written down of what people say: texts that end, and that every part of the platform can keep."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, TypeVar

from plm_shared.canonical_json import encodable

from plm_engine_core.control_plane.errors import InvalidRequest

LONGEST_REASON: Final = 2000
LONGEST_NAME: Final = 200
LONGEST_KEY: Final = 255

Word = TypeVar("Word", bound=StrEnum)


def check_text(text: str, *, field: str, longest: int) -> None:
    """Refuse a text that is nothing, has no end, or cannot be stored.

    Raises:
        InvalidRequest: names the field.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > longest:
        raise InvalidRequest(f"'{field}' must be 1 to {longest} characters, not all of them blank", field=field)
    check_storable(text, field=field)


def check_storable(text: str, *, field: str) -> None:
    """Refuse a text that cannot be stored.

    Raises:
        InvalidRequest: names the field.
    """
    if "\0" in text or not encodable(text):
        raise InvalidRequest(f"'{field}' holds NUL or half a surrogate pair, which cannot be stored", field=field)


def word_of(kind: type[Word], said: Any, *, field: str) -> Word:
    """The word of a vocabulary that was said, be it as a plain text.

    Raises:
        InvalidRequest: it is none of them; names the field.
    """
    try:
        return kind(said)
    except ValueError:
        words = ", ".join(repr(each.value) for each in kind)
        raise InvalidRequest(f"'{field}' must be one of {words}, not {said!r:.80}", field=field) from None
