from __future__ import annotations

import asyncio
import io
import math
import random
import struct
import sys
import wave
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from plugin_substrate import InputFile, OutputFile, PluginInputError, PluginMeta
from plugin_substrate.testing import PluginWorker, PluginWorkers

# The first test of a run on a new machine installs the libraries.
pytestmark = pytest.mark.timeout(900)


def flowers(count: int) -> tuple[list[list[float]], list[str]]:
    """Three clouds of points with a name each."""
    points = random.Random(7)
    labels = [("rose", "tulip", "lily")[number % 3] for number in range(count)]
    middles = {"rose": 0.0, "tulip": 3.0, "lily": 6.0}
    return [[points.gauss(middles[label], 0.5) for _ in range(4)] for label in labels], labels


def tone(seconds: float, rate: int) -> InputFile:
    """A sound file of 440 Hz."""
    samples = [int(20_000 * math.sin(2 * math.pi * 440 * n / rate)) for n in range(int(seconds * rate))]
    raw = io.BytesIO()
    with wave.open(raw, "wb") as file:
        file.setparams((1, 2, rate, len(samples), "NONE", "not compressed"))
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    return InputFile("tone.wav", "audio/wav", raw.getvalue())


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG file, each with its checksum verified."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place = 8
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        kind, body = png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", png, place + 8 + length) == (zlib.crc32(kind + body),)
        yield kind, body
        place += 12 + length


CHART = {"title": "Stock", "x": [0, 1, 2, 3], "lines": {"nails": [9, 7, 4, 1], "screws": [2, 2.5, 3, 8]}}


def test_libraries_that_exclude_each_other_are_loaded_side_by_side(
    forecaster: PluginWorker, plotter: PluginWorker, transcoder: PluginWorker, other_python: str
) -> None:
    numbers = forecaster.call(action="forecast.about").value
    charts = plotter.call(action="plot.about").value
    media = transcoder.call(action="media.about").value
    assert (numbers["pydantic"].split(".")[0], charts["pydantic"].split(".")[0]) == ("2", "1")
    assert charts["python"].startswith(f"{other_python}.")
    assert numbers["python"] == media["python"] == sys.version.split()[0]
    assert len({worker.instance.pid for worker in (forecaster, plotter, transcoder)}) == 3


def test_a_model_is_trained_with_threads_and_outlives_its_worker(forecaster: PluginWorker) -> None:
    features, labels = flowers(150)
    trained = forecaster.call(action="forecast.train", model="flowers", features=features, labels=labels)
    assert trained.value["classes"] == ["lily", "rose", "tulip"]
    assert trained.value["score"] > 0.9
    assert trained.usage == {"trees": 80}
    assert not [line for line in trained.logs if "warn" in line.lower()]
    forecaster.kill()
    new = [[0.1, -0.2, 0.0, 0.3], [6.1, 5.8, 6.0, 6.3]]
    assert forecaster.call(action="forecast.predict", model="flowers", features=new).value == ["rose", "lily"]


def test_arrays_cross_both_ways_small_and_large(forecaster: PluginWorker) -> None:
    features, labels = flowers(60)
    forecaster.call(action="forecast.train", model="arrays", features=np.array(features), labels=labels)
    found = forecaster.call(action="forecast.probabilities", model="arrays", features=np.array(features)).value
    assert (found.shape, found.dtype) == ((60, 3), np.float64)
    assert np.allclose(found.sum(axis=1), 1)
    table = np.random.default_rng(7).normal(5, 2, (250_000, 8))  # 16 MB there, 8 MB back
    scaled = forecaster.call(action="forecast.standardize", table=table).value
    assert scaled["table"].dtype == np.float32
    assert np.allclose(scaled["table"], (table - table.mean(axis=0)) / table.std(axis=0), atol=1e-4)
    assert np.allclose(scaled["mean"], table.mean(axis=0))


def test_what_a_library_refuses_is_the_callers_error(forecaster: PluginWorker, plotter: PluginWorker) -> None:
    with pytest.raises(PluginInputError, match="1 rows of features, 2 labels") as caught:
        forecaster.call(action="forecast.train", model="bad", features=[[1.0]], labels=["a", "b"])
    assert caught.value.fields_invalid == ("features", "labels")
    with pytest.raises(PluginInputError, match="line 'nails' has 1 points"):
        plotter.call(action="plot.lines", **{**CHART, "lines": {"nails": [1]}})


def test_fifty_threads_with_blas_in_each_fit_into_the_default_profile(forecaster: PluginWorker) -> None:
    assert forecaster.call(action="forecast.solve", size=120, threads=50).value < 1e-6


def test_a_chart_is_drawn_as_a_whole_png(plotter: PluginWorker) -> None:
    drawn = plotter.call(action="plot.lines", **CHART)
    image = drawn.value
    assert isinstance(image, OutputFile)
    found = list(chunks(image.data))
    assert struct.unpack(">II", found[0][1][:8]) == (600, 400)
    pixels = zlib.decompress(b"".join(body for kind, body in found if kind == b"IDAT"))
    assert len(set(pixels)) > 20, "an empty canvas has fewer shades"
    assert not [line for line in drawn.logs if "cache" in line], "the font cache has a place to be written to"


def test_sound_and_frames_go_through_a_real_ffmpeg(transcoder: PluginWorker) -> None:
    flac = transcoder.call(action="media.audio", sound=tone(0.5, 44_100), rate=16_000).value
    assert (flac.name, flac.data[:4]) == ("tone.flac", b"fLaC")
    assert int.from_bytes(flac.data[18:21], "big") >> 4 == 16_000  # STREAMINFO: 20 bits of sample rate
    frames = b"".join(bytes((x * 4, y * 4, frame * 20)) for frame in range(10) for y in range(32) for x in range(32))
    video = transcoder.call(action="media.video", frames=frames, width=32, height=32).value
    assert video.data[:4] == b"\x1a\x45\xdf\xa3"
    assert b"ffv1" in video.data.lower()
    with pytest.raises(PluginInputError, match="ffmpeg failed with status"):
        transcoder.call(action="media.audio", sound=InputFile("x.wav", "audio/wav", b"no sound"), rate=16_000)


@pytest.mark.parametrize(
    ("isolation", "others"),
    [({}, 0), ({"processes": 4, "write_paths": ["/dev/shm"]}, 1)],  # noqa: S108 - where the semaphores of pools are
    ids=["by default", "granted"],
)
def test_a_pool_of_processes_is_used_where_it_is_granted_and_done_without_elsewhere(
    plugin_workers: PluginWorkers, metas: dict[str, PluginMeta], isolation: dict[str, Any], others: int
) -> None:
    features, labels = flowers(60)
    granted = replace(metas["forecaster"].manifest, overrides={"isolation": isolation})
    worker = plugin_workers.start(PluginMeta(manifest=granted), {"trees": 1})
    found = worker.call(action="forecast.search", features=features, labels=labels, jobs=2)
    assert found.value["max_depth"] == 2
    assert min(found.value["other_processes"], 1) == others
    assert not [line for line in found.logs if "Error" in line or "died" in line], found.logs


async def test_a_cancelled_call_ends_its_ffmpeg(
    metas: dict[str, PluginMeta], tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with PluginWorkers(tmp_path_factory.mktemp("host")) as workers:
        transcoder = await workers.start_async(metas["transcoder"])
        begun = asyncio.Event()
        call = asyncio.create_task(
            workers.manager.execute_plugin_async(
                transcoder.instance_id, action="media.endless", on_progress=lambda *_: begun.set()
            )
        )
        await begun.wait()
        (ffmpeg,) = (process for process in workers.processes() if "binaries/ffmpeg" in str(process))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await transcoder.call_async(action="media.about")
        assert not ffmpeg.alive


def test_all_three_work_at_the_same_time(
    real_workers: PluginWorkers, forecaster: PluginWorker, plotter: PluginWorker, transcoder: PluginWorker
) -> None:
    features, labels = flowers(90)

    async def work() -> list[Any]:
        return await asyncio.gather(
            forecaster.call_async(action="forecast.train", model="m", features=features, labels=labels),
            plotter.call_async(action="plot.lines", **CHART),
            transcoder.call_async(action="media.audio", sound=tone(0.5, 8_000), rate=8_000),
        )

    trained, drawn, sounded = (result.value for result in real_workers.run(work))
    assert trained["score"] > 0.9
    assert drawn.data.startswith(b"\x89PNG")
    assert sounded.data.startswith(b"fLaC")
