"""Text that foreign code wrote, made fit for a terminal, a log and a database."""

from __future__ import annotations

MAX_LINE_CHARACTERS = 8192


def clean_line(line: str, limit: int = MAX_LINE_CHARACTERS) -> str:
    """Return one line, cut to ``limit`` characters; control characters and lone surrogates are written as escapes."""
    return _clean(line, limit, "\t")


def clean_text(text: str, limit: int) -> str:
    """Like `clean_line`, for text of several lines."""
    return _clean(text, limit, "\t\n")


def _clean(text: str, limit: int, kept: str) -> str:
    text = text[:limit]
    if text.isprintable():
        return text
    shown = (letter if letter.isprintable() or letter in kept else ascii(letter)[1:-1] for letter in text)
    return "".join(shown)[:limit]  # an escape is longer than what it stands for
