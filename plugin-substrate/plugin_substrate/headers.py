"""What the headers of a worker's frames say. Foreign code may have written them: what breaks a rule is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

from plugin_substrate.errors import ProtocolError
from plugin_substrate.interface import check_usage, is_amount
from plugin_substrate.worker.frames import PROTOCOL_VERSION
from plugin_substrate.worker.text import clean_line

_MAX_LAYERS = 64
_MAX_NAME = 64
_MOST_SPENT = 2**60  # seconds or bytes: more than any machine has, and sums of it are still numbers

Header = dict[str, Any]


class Spent(NamedTuple):
    """What a worker says of itself at the end of a call; None where it says nothing."""

    cpu_seconds: float | None = None
    peak_bytes: float | None = None


def text_of(header: Header, key: str) -> str:
    """Return a text as it was written."""
    value = header.get(key)
    if isinstance(value, str):
        return value
    raise ProtocolError(f"{key} is {value!r:.80}, not text")


def line_of(header: Header, key: str) -> str:
    """Return a text that can be shown as one line."""
    return clean_line(text_of(header, key))


def hello_of(header: Header) -> tuple[tuple[str, ...], str]:
    """Return the layers of confinement and the interpreter's version."""
    if header.get("protocol") != PROTOCOL_VERSION:
        raise ProtocolError(f"the worker speaks protocol {header.get('protocol')!r:.20}, not {PROTOCOL_VERSION}")
    layers = header.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ProtocolError("layers is not a list of texts")
    return tuple(clean_line(layer, _MAX_NAME) for layer in layers[:_MAX_LAYERS]), line_of(header, "python")[:_MAX_NAME]


def progress_of(header: Header) -> float:
    """Return a progress report's number: -1, or 0 to 1."""
    progress = header.get("progress")
    if not isinstance(progress, int | float) or not (progress == -1 or 0 <= progress <= 1):
        raise ProtocolError(f"progress is {progress!r:.80}")
    return float(progress)


def usage_of(header: Header) -> dict[str, float]:
    """Return a usage report."""
    usage = header.get("usage")
    if not isinstance(usage, dict):
        raise ProtocolError(f"usage is {usage!r:.80}, not an object")
    try:
        check_usage(usage)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
    return usage


def spent_of(header: Header) -> Spent:
    """Return what a call cost the worker."""
    spent = header.get("spent", {})
    if not isinstance(spent, dict):
        raise ProtocolError(f"spent is {spent!r:.80}, not an object")
    cpu, peak = spent.get("cpu_seconds"), spent.get("peak_bytes")
    for figure in (cpu, peak):
        if figure is not None and not (is_amount(figure) and figure <= _MOST_SPENT):
            raise ProtocolError(f"spent is {spent!r:.80}, not amounts")
    return Spent(cpu, peak)


def counts_of(header: Header, segments: int) -> list[int]:
    """Return how many of a frame's segments belong to each chunk; together they are all of them."""
    counts = header.get("counts")
    if not isinstance(counts, list) or not counts or not all(type(count) is int and count > 0 for count in counts):
        raise ProtocolError(f"counts is {counts!r:.80}, not a list of numbers")
    if sum(counts) != segments:
        raise ProtocolError("the chunks of a frame do not add up to its segments")
    return counts
