"""The frames between host and worker, without any I/O: both sides put bytes in and get frames out.

A frame is two unsigned 32-bit numbers in network order (length of all that follows, length of the header), the header
(a JSON object in UTF-8) and raw binary segments, whose lengths the header lists under ``segments``. Headers are small,
so that no frame costs much to understand; values travel in segments (see `plugin_substrate.worker.values`). Nothing is
ever unpickled. What breaks these rules is a `ProtocolError`; the decoder is useless after it.
"""

from __future__ import annotations

import json
import json.encoder
import json.scanner
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from plugin_substrate.errors import ProtocolError
from plugin_substrate.worker.large_frames import LargeFrame
from plugin_substrate.worker.parked import Segment

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 256 << 20
MAX_HEADER_BYTES = 256 << 10
MAX_SEGMENTS = 4096

_PREFIX = struct.Struct(">II")
_PORTION = 64 << 10
_LARGE_PORTION = 512 << 10


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

    Small frames are received into a buffer that stays for those after them. What is larger than one portion leaves it
    when its header is complete: its segments are put together, and mostly received, in the memory that is handed out.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._limit = max_frame_bytes
        self._buffer = bytearray(_PORTION)
        self._held = 0
        self._needed = 0  # bytes that the buffer has to hold, should it be a long header
        self._large: LargeFrame | None = None  # the frame at the front, when it has left the buffer
        self._past_buffer = False

    def room(self) -> memoryview:
        """Return where to receive the next bytes; then release it, and tell `received` how many.

        Small frames come in portions that are quick to handle, however many are waiting.
        """
        large = self._large
        self._past_buffer = large is not None and large.missing > _PORTION
        if large is not None and self._past_buffer:
            return large.room(_LARGE_PORTION)
        if len(self._buffer) < self._needed:
            self._buffer += bytes(self._needed - len(self._buffer))
        return memoryview(self._buffer)[self._held : self._held + _PORTION]

    def received(self, count: int) -> Iterator[Frame]:
        """Yield the frames that are complete now."""
        start, self._needed = 0, 0
        large = self._large
        if large is None:
            self._held += count
        else:
            start = self._received_of(large, count)
            if not large.missing:
                self._large = None
                yield Frame(large.header, tuple(large.segments))
        while self._held - start >= _PREFIX.size:
            total, header_length = _PREFIX.unpack_from(self._buffer, start)
            if total > self._limit or header_length > min(total, MAX_HEADER_BYTES):
                raise ProtocolError(f"a frame announces {total} bytes with a header of {header_length}")
            body = start + _PREFIX.size + header_length
            end = start + _PREFIX.size + total
            if self._held < end:
                start = self._set_apart(start, body, end)
                break
            yield _parse(self._buffer, start + _PREFIX.size, body, end)
            start = end
        if start:
            self._held -= start
            self._buffer[: self._held] = self._buffer[start : start + self._held]

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
        return self._held + (self._large.arrived if self._large is not None else 0)

    def _received_of(self, large: LargeFrame, count: int) -> int:
        """Give a large frame what was received; returns how much of the buffer is done with."""
        if self._past_buffer:
            large.received(count)
            return 0
        self._held += count
        return large.take(memoryview(self._buffer)[: self._held])

    def _set_apart(self, start: int, body: int, end: int) -> int:
        """Take a large frame out of the buffer once its header is there; returns how much of that is done with."""
        if end - start <= _PORTION or self._held < body:
            self._needed = body - start
            return start
        header, lengths = _parse_header(self._buffer[start + _PREFIX.size : body], end - body)
        self._large = LargeFrame(header, lengths, body - start)
        return body + self._large.take(memoryview(self._buffer)[body : self._held])


def to_json(value: Any) -> bytes:
    """Return a value as JSON in ASCII; what JSON cannot say is a ValueError or TypeError."""
    return _ENCODE(value).encode("ascii")


def parse_json(raw: bytes | bytearray) -> Any:
    """Return the JSON value in UTF-8; anything else, also NaN and what is nested too deep, is a `ProtocolError`."""
    try:
        text = raw.decode()
        value, end = _SCAN(text, 0)
        if end != len(text):
            raise ValueError(f"it ends after {end} of {len(text)} characters")  # noqa: TRY301
    except StopIteration as stop:
        raise ProtocolError(f"a frame does not hold JSON: no value at character {stop.value}") from stop
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame does not hold JSON: {error}") from error
    return value


def _parse(buffer: bytearray, start: int, body: int, end: int) -> Frame:
    header, lengths = _parse_header(buffer[start:body], end - body)
    segments = []
    for length in lengths:
        segments.append(bytes(memoryview(buffer)[body : body + length]))
        body += length
    return Frame(header, tuple(segments))


def _parse_header(raw: bytearray, length_of_body: int) -> tuple[dict[str, Any], list[int]]:
    header = parse_json(raw)
    lengths = header.pop("segments", None) if isinstance(header, dict) else None
    if not isinstance(lengths, list):
        raise ProtocolError("a frame header is not an object with a list of segment lengths")
    for length in lengths:
        if type(length) is not int or length < 0:
            raise ProtocolError("a frame header's segment lengths are not whole numbers from 0")
    if len(lengths) > MAX_SEGMENTS or sum(lengths) != length_of_body:
        raise ProtocolError("the segments of a frame do not add up to its length")
    return header, lengths


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
_SCAN: Callable[[str, int], tuple[Any, int]] = json.scanner.make_scanner(json.JSONDecoder(parse_constant=_no_constant))  # type: ignore[arg-type] # as JSONDecoder itself does
