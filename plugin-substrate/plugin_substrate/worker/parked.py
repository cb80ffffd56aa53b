"""Large binary segments beside the stream: each in a memory file whose descriptor travels with its frame.

A host sends them so; a confined worker may have no memory files, as what it holds in them nobody could see.

The frame's header lists them under ``parked`` as ``[place among the segments, bytes]``, in the order of the
descriptors, which arrive with the frame's first byte. They are read with pread and never mapped: whoever sent one may
still change or shorten it, which then is a `ProtocolError` and not a SIGBUS.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence
from typing import Any

from plugin_substrate.errors import ProtocolError

#: A segment from here on is parked where the system has memory files. Below it the stream is faster, as both sides work
#: at the same time and in caches: 16 MiB there and back took 22 ms in the stream and 55 ms parked.
PARK_BYTES = 32 << 20
_SEALS = (
    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE if sys.platform == "linux" else 0
)
#: The most descriptors that travel with one frame; what is over it stays in the stream.
MAX_PARKED = 8


class Parked:
    """A segment that waits in a memory file. Owns the descriptor; `read` takes the bytes out, once."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size

    def __len__(self) -> int:
        return self._size

    def read(self) -> bytes:
        """Return the bytes; a `ProtocolError` when they are not all there."""
        parts, missing = [], self._size
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_GET_SEALS)  # fails for all but memory files: others might block
            while missing:
                part = os.pread(self._descriptor, missing, self._size - missing)
                if not part:
                    raise ProtocolError(f"a parked segment is {missing} bytes short of the {self._size} announced")
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise ProtocolError(f"a parked segment cannot be read: {error}") from error
        finally:
            self.close()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Give up the descriptor."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


Segment = bytes | Parked


def is_parking_called_for(segments: Sequence[bytes]) -> bool:
    """Whether `park` would do anything, which for most frames is not so."""
    return len(segments) > 1 and max(map(len, segments)) >= PARK_BYTES


def park(segments: Sequence[bytes]) -> tuple[list[bytes], list[list[int]], list[int]]:
    """Return the segments that stay in the stream, the header's list of the others, and these others' descriptors.

    The first segment stays: it is JSON. Where memory files are not to be had, all stay.
    """
    staying: list[bytes] = []
    parked: list[list[int]] = []
    descriptors: list[int] = []
    for place, segment in enumerate(segments):
        descriptor = -1
        if place and len(segment) >= PARK_BYTES and len(parked) < MAX_PARKED:
            descriptor = _memory_file(segment)
        if descriptor < 0:
            staying.append(segment)
        else:
            parked.append([place, len(segment)])
            descriptors.append(descriptor)
    return staying, parked, descriptors


def unpark(segments: Sequence[Segment], announced: Any, descriptors: list[int], limit: int) -> tuple[Segment, ...]:
    """Return all segments of a frame in their places, taking from ``descriptors`` those that its header announces."""
    if not isinstance(announced, list) or not 0 < len(announced) <= MAX_PARKED:
        raise ProtocolError("a frame header's list of parked segments is malformed")
    whole: list[Segment] = list(segments)
    for entry in announced:
        match entry:
            case [place, size] if type(place) is type(size) is int and _fits(place, whole, size, limit) and descriptors:
                whole.insert(place, Parked(descriptors.pop(0), size))
                limit -= size
            case _:
                raise ProtocolError("a parked segment has no place, no descriptor, or is over the limit")
    return tuple(whole)


def _fits(place: int, whole: Sequence[Segment], size: int, limit: int) -> bool:
    return 0 < place <= len(whole) and 0 < size <= limit


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that have no owner any more."""
    for descriptor in descriptors:
        os.close(descriptor)


def _memory_file(data: bytes) -> int:
    """Return the descriptor of a memory file with ``data``, or -1 where there can be none."""
    if not hasattr(os, "memfd_create"):
        return -1
    descriptor = -1
    try:
        descriptor = os.memfd_create("plugin-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)  # who keeps it can make no use of it as memory
    except OSError:  # no memory for it, or it is forbidden: the stream carries it too
        if descriptor >= 0:
            os.close(descriptor)
        return -1
    return descriptor
