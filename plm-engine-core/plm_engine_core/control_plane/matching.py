"""Patterns that policies and evaluators match texts with, in time linear in the text, whoever wrote it.

A *glob* is anchored at both ends: `*` stands for any characters, none included, `?` for exactly one; a *regex* is in
RE2's syntax and matches the whole text. Both ignore case. Longer texts than `LONGEST_TEXT` are not matched at all.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

LONGEST_TEXT = 65_536
"""In characters; 64 Ki."""

_REGEX_MEMORY = 8 << 20

Matcher = Callable[[str], bool | None]
"""Whether a text matches; None when it is too long, or no text that can be encoded."""


class Match(StrEnum):
    """How a pattern is to be read; a policy always says which."""

    GLOB = "glob"
    REGEX = "regex"


class BadPattern(ValueError):
    """The pattern cannot be read."""


def matcher(pattern: str, kind: Match, *, anywhere: bool = False, ignore_case: bool = True) -> Matcher:
    """Compile a pattern once; `anywhere` lets a regex match a part of the text, `ignore_case` is for a regex too.

    Raises:
        BadPattern: it is empty, or not in RE2's syntax (which has no back-references and no look-around).
    """
    if not pattern:
        raise BadPattern("the pattern is empty; it would match nothing but an empty text")
    if kind is Match.REGEX:
        return _regex(pattern, anywhere=anywhere, ignore_case=ignore_case)
    return _glob(pattern)


def any_of(patterns: tuple[str, ...], kind: Match) -> Matcher:
    """Whether any of the patterns matches; None when none does and one could not be tried."""
    matchers = [matcher(pattern, kind) for pattern in patterns]
    if len(matchers) == 1:
        return matchers[0]

    def matches(text: str) -> bool | None:
        found: bool | None = False
        for each in matchers:
            answer = each(text)
            if answer:
                return True
            if answer is None:
                found = None
        return found

    return matches


def _glob(pattern: str) -> Matcher:
    folded = pattern.casefold()
    if "?" in folded:
        translated = "".join({"*": ".*", "?": "."}.get(character, _escaped(character)) for character in folded)
        return _regex(translated, anywhere=False, fold=True)
    first, *middle = folded.split("*")
    if not middle:
        return lambda text: len(text) <= LONGEST_TEXT and text.casefold() == folded
    last = middle.pop()

    def matches(text: str) -> bool | None:
        if len(text) > LONGEST_TEXT:
            return None
        text = text.casefold()
        end = len(text) - len(last)
        if end < len(first) or not text.startswith(first) or not text.endswith(last):
            return False
        place = len(first)
        for piece in middle:
            place = text.find(piece, place, end)
            if place < 0:
                return False
            place += len(piece)
        return True

    return matches


def _escaped(character: str) -> str:
    return "\\" + character if character.isascii() and not character.isalnum() and character != "_" else character


def _regex(pattern: str, *, anywhere: bool, ignore_case: bool = True, fold: bool = False) -> Matcher:
    compiled = _compiled(pattern, dot_matches_newline=fold, ignore_case=ignore_case)
    search = compiled.search if anywhere else compiled.fullmatch

    def matches(text: str) -> bool | None:
        if len(text) > LONGEST_TEXT:
            return None
        try:
            return search(text.casefold() if fold else text) is not None
        except UnicodeEncodeError:
            return None

    return matches


def _compiled(pattern: str, *, dot_matches_newline: bool, ignore_case: bool) -> Any:
    import re2

    options = re2.Options()
    options.case_sensitive = not ignore_case
    options.log_errors = False
    options.max_mem = _REGEX_MEMORY
    options.dot_nl = dot_matches_newline
    try:
        return re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        words = error.args[0] if error.args else error
        raise BadPattern(
            f"{pattern!r} is no RE2 pattern: {words.decode() if isinstance(words, bytes) else words}"
        ) from error
