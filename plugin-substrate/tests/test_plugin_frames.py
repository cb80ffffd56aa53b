from __future__ import annotations

import json
import json.encoder
import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import ProtocolError
from plugin_substrate.worker import frames
from plugin_substrate.worker.frames import Frame, FrameDecoder, encode_frame

headers = st.dictionaries(st.text().filter(lambda key: key != "segments"), st.none() | st.integers() | st.text())


@given(st.lists(st.tuples(headers, st.lists(st.binary(max_size=50), max_size=3)), max_size=4), st.integers(1, 64))
def test_frames_arrive_whole_and_in_order_however_the_bytes_are_cut(
    sent: list[tuple[dict[str, object], list[bytes]]], size: int
) -> None:
    stream = b"".join(piece for header, segments in sent for piece in encode_frame(header, segments))
    decoder = FrameDecoder()
    received = [frame for start in range(0, len(stream), size) for frame in decoder.feed(stream[start : start + size])]
    assert received == [Frame(header, tuple(segments)) for header, segments in sent]
    assert decoder.pending == 0


@given(st.binary(max_size=200))
def test_random_bytes_are_frames_incomplete_or_a_protocol_error(data: bytes) -> None:
    try:
        list(FrameDecoder().feed(data))
    except ProtocolError:
        return


@given(st.binary(max_size=80), st.integers(0, 100))
def test_a_random_header_with_true_lengths_is_a_frame_or_a_protocol_error(header: bytes, extra: int) -> None:
    raw = struct.pack(">II", len(header) + extra, len(header)) + header + b"x" * extra
    try:
        list(FrameDecoder().feed(raw))
    except ProtocolError:
        return


def frame_of(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">II", len(header) + len(body), len(header)) + header + body


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">II", frames.MAX_FRAME_BYTES + 1, 0),
        struct.pack(">II", 10, 11),
        struct.pack(">II", frames.MAX_FRAME_BYTES, frames.MAX_HEADER_BYTES + 1),
        frame_of(b"[]"),
        frame_of(b"{}"),
        frame_of(b'{"segments": [1]}'),
        frame_of(b'{"segments": [-1, 2]}', b"x"),
        frame_of(b'{"segments": [true]}', b"x"),
        frame_of(b'{"segments": [1.0]}', b"x"),
        frame_of(b'{"segments": [], "x": NaN}'),
        frame_of(b"[" * 100_000),
        frame_of(b'{"segments": [], "x": "\xff"}'),
        frame_of(b'{"segments": []}', b"x"),
        frame_of(b'{"segments": []} {}'),
    ],
    ids=range(14),
)
def test_a_frame_that_breaks_a_rule_is_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(FrameDecoder().feed(raw))


@pytest.mark.parametrize("in_c", [True, False])
def test_json_is_written_alike_where_the_interpreter_has_no_part_of_it_in_c(
    in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_c:
        monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    encode = frames.fast_encode(json.JSONEncoder(separators=(",", ":"), allow_nan=False))
    assert encode({"a": [1, 2.5, None, True, 10**30], "\u00e9\ud800": {}}) == (
        '{"a":[1,2.5,null,true,1000000000000000000000000000000],"\\u00e9\\ud800":{}}'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode([float("nan")])
    with pytest.raises(TypeError, match="set"):
        encode({"a": {1}})


def test_an_announced_length_takes_no_memory_before_its_bytes_arrive() -> None:
    decoder = FrameDecoder()
    assert list(decoder.feed(struct.pack(">II", frames.MAX_FRAME_BYTES, 10))) == []
    assert decoder.pending == 8


def traced(work: Callable[[], object]) -> int:
    """Return the most memory that Python held at once for ``work``."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [100 << 10, 1 << 20, 20 << 20])
def test_memory_follows_the_bytes_that_have_arrived_and_not_the_length_announced(size: int) -> None:
    decoder = FrameDecoder()
    header = json.dumps({"segments": [200 << 20]}).encode()
    begun = struct.pack(">II", len(header) + (200 << 20), len(header)) + header
    arrived = begun + bytes(size - len(begun))
    assert traced(lambda: list(decoder.feed(arrived))) < min(5 * size, size + (10 << 20))
    assert decoder.pending == size


def test_a_large_frame_is_refused_for_its_header_before_its_segments_arrive() -> None:
    header = b'{"segments": [-1]}'
    with pytest.raises(ProtocolError, match="segment lengths"):
        list(FrameDecoder().feed(struct.pack(">II", len(header) + (200 << 20), len(header)) + header))


def test_a_large_frame_of_which_only_the_header_is_there_is_pending() -> None:
    (first, segment) = encode_frame({}, [bytes(1 << 20)])
    decoder = FrameDecoder()
    assert list(decoder.feed(first)) == []
    assert decoder.pending == len(first)
    assert list(decoder.feed(segment)) == [Frame({}, (segment,))]
    assert decoder.pending == 0


@pytest.mark.parametrize("cut", [1 << 30, 100_003, 4096])
def test_frames_of_all_sizes_arrive_whole_one_after_the_other(cut: int) -> None:
    sizes = [0, 10, 65_000, 65_536, 70_000, 1 << 20, (1 << 20) + 65_536, 3 << 20, 5, 2 << 20, 1 << 20, 300_000, 0]
    sent = [Frame({"place": place}, (bytes([place]) * size, b"end")) for place, size in enumerate(sizes)]
    stream = b"".join(piece for frame in sent for piece in encode_frame(frame.header, frame.segments))
    decoder = FrameDecoder()
    received = [frame for start in range(0, len(stream), cut) for frame in decoder.feed(stream[start : start + cut])]
    assert received == sent
    assert decoder.pending == 0


@pytest.mark.parametrize("cut", [1 << 30, 100_003, 4096])
def test_segments_of_all_sizes_arrive_in_one_frame(cut: int) -> None:
    sizes = [0, 3 << 20, 0, 0, *[900] * 3000, 65_536, 65_537, 1 << 20, 1, 0]
    sent = Frame({}, tuple(bytes([place % 256]) * size for place, size in enumerate(sizes)))
    stream = b"".join(encode_frame(sent.header, sent.segments)) * 2
    decoder = FrameDecoder()
    received = [frame for start in range(0, len(stream), cut) for frame in decoder.feed(stream[start : start + cut])]
    assert received == [sent, sent]


@pytest.mark.parametrize("length", [60_000, 65_500, 65_536, 70_000, 200_000])
@pytest.mark.parametrize("size", [0, 1, 70_000, 1 << 20])
def test_long_headers_arrive_with_small_and_large_frames_around_them(length: int, size: int) -> None:
    sent = [Frame({"text": "x"}), Frame({"text": "y" * length}, (b"z" * size,)), Frame({"text": "x"})] * 2
    stream = b"".join(piece for frame in sent for piece in encode_frame(frame.header, frame.segments))
    assert list(FrameDecoder().feed(stream)) == sent


def test_a_large_segment_takes_memory_once() -> None:
    raw = b"".join(encode_frame({}, [bytes(16 << 20)]))
    decoder = FrameDecoder()
    assert traced(lambda: [len(frame.segments) for frame in decoder.feed(raw)]) < 1.1 * len(raw)


def test_a_frame_over_the_limit_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        encode_frame({}, [b"x" * (frames.MAX_FRAME_BYTES // 2), b"x" * (frames.MAX_FRAME_BYTES // 2)])
