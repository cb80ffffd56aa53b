"""The log file of an instance: bounded, closed to others, and never in the way of a call."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest
from plugin_substrate.log_file import LogFile, read_tail


async def test_a_full_file_is_put_aside_once_and_size_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "reader.log"
    log = LogFile(path, max_bytes=2000)
    for number in range(500):
        log.line("call", f"line {number}")
        if number % 7 == 0:
            await asyncio.sleep(0)
    log.close()
    assert {file.name for file in path.parent.iterdir()} == {"reader.log", "reader.log.1"}
    assert all(file.stat().st_size <= 2000 for file in path.parent.iterdir())
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in path.parent.iterdir())
    tail = read_tail(path, 40).split("\n")
    assert [line.rpartition(" ")[2] for line in tail] == [str(number) for number in range(460, 500)]


async def test_a_flood_in_one_turn_of_the_loop_keeps_whole_lines(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "reader.log", max_bytes=2000)
    for number in range(500):
        log.line("call", f"--- Starting evil {number} ---")
    log.close()
    lines = (tmp_path / "reader.log").read_text().splitlines()
    assert len(lines) > 20
    assert all(" call | --- Starting evil " in line for line in lines)


async def test_lines_are_in_the_file_before_the_loop_goes_on(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "reader.log")
    log.line("", "outside of a call")
    log.line("c-1", "inside")
    await asyncio.sleep(0)
    lines = (tmp_path / "reader.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["- | outside of a call", "c-1 | inside"]
    log.close()


async def test_a_file_that_cannot_be_written_costs_its_lines_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "reader.log").mkdir()
    log = LogFile(tmp_path / "reader.log")
    for _ in range(3):
        log.line("", "lost")
        await asyncio.sleep(0)
    log.close()
    assert caplog.text.count("cannot be written") == 1


async def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "reader.log").symlink_to(tmp_path / "elsewhere")
    log = LogFile(tmp_path / "reader.log")
    log.line("", "lost")
    log.close()
    assert not (tmp_path / "elsewhere").exists()


async def test_an_older_file_that_others_could_read_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "reader.log"
    path.touch(mode=0o644)
    log = LogFile(path)
    log.line("", "x")
    log.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_what_was_left_by_another_version_is_read_whatever_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "reader.log"
    path.write_bytes(b"\xff\xfe old\nlines\n")
    assert read_tail(path, 2) == "\ufffd\ufffd old\nlines"
    assert read_tail(tmp_path / "none.log", 2) == "No logs found."
