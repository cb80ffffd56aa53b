"""The frames between host and worker, without any I/O: both sides put bytes in and get frames out.

A frame is two unsigned 32-bit numbers in network order (length of all that follows, length of the header), the header
(a JSON object in UTF-8) and raw binary segments, whose lengths the header lists under ``segments``. Headers are small,
so that no frame costs much to understand; values travel in segments (see `plugin_substrate.worker.values`). Nothing is
ever unpickled. What breaks these rules is a `ProtocolError`; the decoder is useless after it.
"""

from __future__ import annotations

import json
import json.encoder
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from plugin_substrate.errors import ProtocolError
from plugin_substrate.worker.parked import Segment

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 256 << 20
MAX_HEADER_BYTES = 256 << 10
MAX_SEGMENTS = 4096

_PREFIX = struct.Struct(">II")
_PORTION = 64 << 10
_LARGE_PORTION = 512 << 10
_LEAST_ROOM = 8 << 10
_GROWTH = 4
_KEPT_BYTES = (1 << 20) + _PORTION  # a megabyte and what surrounds it


class Frame(NamedTuple):
    """One message: a JSON object and the binary segments it refers to."""

    header: dict[str, Any]
    segments: tuple[Segment, ...] = ()


def encode_frame(header: dict[str, Any], segments: Sequence[bytes] = ()) -> list[bytes]:
    """Return the pieces to write, in order; a frame over the limits is a `ProtocolError`."""
    lengths = [len(segment) for segment in segments]
    raw = to_json({**header, "segments": lengths})
    total = len(raw) + sum(lengths)
    if len(raw) > MAX_HEADER_BYTES or total > MAX_FRAME_BYTES or len(segments) > MAX_SEGMENTS:
        raise ProtocolError(
            f"a frame of {total} bytes ({len(raw)} of them header, {len(segments)} binary segments) is over the "
            f"limit of {MAX_FRAME_BYTES} bytes ({MAX_HEADER_BYTES} header, {MAX_SEGMENTS} segments)"
        )
    together = len(segments) if total <= _PORTION else sum(length <= _PORTION for length in lengths[:1])
    return [b"".join([_PREFIX.pack(total, len(raw)), raw, *segments[:together]]), *segments[together:]]


class FrameDecoder:
    """Turns a byte stream into frames. Memory is bounded by one frame, and grows only as its bytes really arrive.

    What is received goes straight to its place in a buffer that stays for the frames after it: fresh memory for each
    costs more than all that is done with the bytes. Only what is larger than that buffer may ever be is put together in
    memory of its own.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._limit = max_frame_bytes
        self._buffer = bytearray(_PORTION)
        self._large: bytearray | None = None  # the frame at the front, where the buffer is too small for it
        self._held = 0
        self._end = _PREFIX.size  # of the frame at the front, as far as it is known

    def room(self) -> memoryview:
        """Return where to receive the next bytes; then tell `received` how many.

        Small frames come in portions that are quick to handle, however many are waiting.
        """
        if self._large is None and len(self._buffer) - self._held < min(_LEAST_ROOM, self._end - self._held):
            self._make_room()
        start = self._held if self._large is None else 0
        portion = _PORTION if self._held <= _PORTION else _LARGE_PORTION
        return memoryview(self._buffer)[start : start + portion]

    def received(self, count: int) -> Iterator[Frame]:
        """Yield the frames that are complete now."""
        if self._large is not None:
            self._large += memoryview(self._buffer)[:count]
        source = self._buffer if self._large is None else self._large
        self._held += count
        start, self._end = 0, _PREFIX.size
        while self._held - start >= _PREFIX.size:
            total, header_length = _PREFIX.unpack_from(source, start)
            if total > self._limit or header_length > min(total, MAX_HEADER_BYTES):
                raise ProtocolError(f"a frame announces {total} bytes with a header of {header_length}")
            end = start + _PREFIX.size + total
            if self._held < end:
                self._end = end - start
                break
            yield _parse(source, start + _PREFIX.size, header_length, end)
            start = end
        if start:
            self._held -= start
            self._buffer[: self._held] = source[start : start + self._held]
            self._large = None

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """Yield the frames that ``data`` completes."""
        rest = memoryview(data)
        while rest:
            room = self.room()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            rest = rest[count:]
            room.release()
            yield from self.received(count)

    @property
    def pending(self) -> int:
        """How many bytes of an unfinished frame are held."""
        return self._held

    def _make_room(self) -> None:
        size = min(-(-self._end // _PORTION) * _PORTION, _GROWTH * len(self._buffer), _KEPT_BYTES)
        if size > len(self._buffer):
            buffer = bytearray(size)
            buffer[: self._held] = memoryview(self._buffer)[: self._held]
            self._buffer = buffer
        else:
            self._large = bytearray(memoryview(self._buffer)[: self._held])


def to_json(value: Any) -> bytes:
    """Return a value as JSON in ASCII; what JSON cannot say is a ValueError or TypeError."""
    return _ENCODE(value).encode("ascii")


def parse_json(raw: bytes | bytearray) -> Any:
    """Return the JSON value in UTF-8; anything else, also NaN and what is nested too deep, is a `ProtocolError`."""
    try:
        text = raw.decode()
        value, end = _DECODER.raw_decode(text)
        if end != len(text):
            raise ValueError(f"it ends after {end} of {len(text)} characters")  # noqa: TRY301
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame does not hold JSON: {error}") from error
    return value


def _parse(buffer: bytearray, start: int, header_length: int, end: int) -> Frame:
    body = start + header_length
    header = parse_json(buffer[start:body])
    lengths = header.pop("segments", None) if isinstance(header, dict) else None
    if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
        raise ProtocolError("a frame header is not an object with a list of segment lengths")
    if len(lengths) > MAX_SEGMENTS or sum(lengths) != end - body:
        raise ProtocolError("the segments of a frame do not add up to its length")
    segments = []
    for length in lengths:
        segments.append(bytes(memoryview(buffer)[body : body + length]))
        body += length
    return Frame(header, tuple(segments))


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def fast_encode(encoder: json.JSONEncoder) -> Callable[[Any], str]:
    """Return what ``encoder.encode`` does; it makes the part that is written in C for each value, if it has one."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return encoder.encode
    pieces = make(None, encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, False)
    return lambda value: "".join(pieces(value, 0))


# Made once: `json.loads` and `json.dumps` with options make them anew for each value.
_ENCODE = fast_encode(json.JSONEncoder(separators=(",", ":"), allow_nan=False))
_DECODER = json.JSONDecoder(parse_constant=_no_constant)
