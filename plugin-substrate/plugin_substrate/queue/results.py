"""Large results, in files of their own; and how any value of a job becomes bytes and comes back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_substrate.errors import PluginError, StoreError
from plugin_substrate.worker.values import pack_value, unpack_value

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """A result that is over the limit of what is kept in the store. The file goes when its job is forgotten."""

    path: Path
    size: int

    def load(self) -> Any:
        """Read the result; a `StoreError` when the file is gone or damaged."""
        try:
            return from_bytes(self.path.read_bytes(), str(self.path))
        except OSError as error:
            raise StoreError(f"the result in {self.path} cannot be read: {error}", path=str(self.path)) from error


def loaded(result: Any) -> Any:
    """Return a result itself, wherever it lies."""
    return result.load() if isinstance(result, ResultFile) else result


def to_bytes(value: Any, name: str) -> bytes:
    """Return a value as bytes; a `WireValueError` names what of it cannot be kept. What crosses to plugins can."""
    segments: Sequence[bytes] = pack_value(value, name)
    return b"".join(part for segment in segments for part in (_LENGTH.pack(len(segment)), bytes(segment)))


def from_bytes(data: bytes, place: str) -> Any:
    """Return the value that `to_bytes` was given; a `StoreError` when the bytes are damaged."""
    segments, at = [], 0
    try:
        while at < len(data):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            segments.append(data[at : at + length])
            at += length
        return unpack_value(segments if at == len(data) else ())
    except (struct.error, ValueError, PluginError) as error:
        raise StoreError(f"what is kept in {place} cannot be read: {error}", path=place) from error
