from __future__ import annotations

import json
import json.encoder
import struct
import tracemalloc

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


def test_memory_follows_the_bytes_that_have_arrived_and_not_the_length_announced() -> None:
    decoder = FrameDecoder()
    arrived = struct.pack(">II", frames.MAX_FRAME_BYTES, 10) + bytes(100 << 10)
    tracemalloc.start()
    try:
        assert list(decoder.feed(arrived)) == []
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 5 * len(arrived)


@pytest.mark.parametrize("cut", [1 << 30, 100_003, 4096])
def test_frames_of_all_sizes_arrive_whole_one_after_the_other(cut: int) -> None:
    sizes = [0, 10, 65_000, 65_536, 70_000, 1 << 20, (1 << 20) + 65_536, 3 << 20, 5, 2 << 20, 1 << 20, 300_000, 0]
    sent = [Frame({"place": place}, (bytes([place]) * size, b"end")) for place, size in enumerate(sizes)]
    stream = b"".join(piece for frame in sent for piece in encode_frame(frame.header, frame.segments))
    decoder = FrameDecoder()
    received = [frame for start in range(0, len(stream), cut) for frame in decoder.feed(stream[start : start + cut])]
    assert received == sent
    assert decoder.pending == 0


def test_large_frames_one_after_the_other_are_received_in_the_same_memory() -> None:
    raw = b"".join(encode_frame({}, [bytes(1 << 20)]))
    decoder = FrameDecoder()
    list(decoder.feed(raw))
    tracemalloc.start()
    try:
        for _ in range(3):
            assert sum(1 for _ in decoder.feed(raw)) == 1
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1.5 * len(raw)  # the segment itself, and nothing else of its size


def test_a_frame_over_the_limit_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        encode_frame({}, [b"x" * (frames.MAX_FRAME_BYTES // 2), b"x" * (frames.MAX_FRAME_BYTES // 2)])
