"""The spool by itself: what its files hold after crashes, outages and full disks."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from plm_shared.ledger import LedgerRecord
from plm_shared.spool import Spool


def records(*numbers: int) -> list[LedgerRecord]:
    return [LedgerRecord("telemetry_events", json.dumps({"payload": {"n": number}})) for number in numbers]


def test_two_processes_share_a_spool_folder_and_only_the_dead_ones_segment_is_adopted(tmp_path: Path) -> None:
    living = Spool(tmp_path, max_bytes=10_000)
    living.append(records(1))
    dead = Spool(tmp_path, max_bytes=10_000)
    assert dead.bytes_waiting == 0
    dead.append(records(2))
    dead.release()
    later = Spool(tmp_path, max_bytes=10_000)
    part = later.take(10, 10_000)
    assert part is not None
    assert list(part.records) == records(2)
    for spool in (living, later):
        spool.release()


def test_a_start_that_comes_while_a_segment_is_made_disturbs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, starts = Spool(tmp_path, max_bytes=10_000), []
    lock = fcntl.flock

    def another_start_first(file: Any, how: int) -> None:
        monkeypatch.setattr("plm_shared.spool.fcntl.flock", lock)
        starts.append(Spool(tmp_path, max_bytes=10_000))
        lock(file, how)

    monkeypatch.setattr("plm_shared.spool.fcntl.flock", another_start_first)
    spool.append(records(1))
    assert len(starts) == 1
    spool.release()
    later = Spool(tmp_path, max_bytes=10_000)
    part = later.take(10, 10_000)
    assert part is not None
    assert list(part.records) == records(1)
    later.release()


def test_a_spool_at_its_limit_waits_until_the_database_has_caught_up(tmp_path: Path) -> None:
    line = len(records(1)[0].text) + 11
    spool = Spool(tmp_path, max_bytes=4 * line)
    for number in range(4):
        spool.append(records(number))
    appended = threading.Event()
    fifth = threading.Thread(target=lambda: (spool.append(records(4)), appended.set()))
    fifth.start()
    seen: list[int] = []
    while len(seen) < 5:
        assert spool.bytes_waiting <= 4 * line
        part = spool.take(1, 10_000)
        assert part is not None
        seen += [json.loads(record.text)["payload"]["n"] for record in part.records]
        spool.done(part)
    fifth.join()
    assert seen == [0, 1, 2, 3, 4]
    spool.release()
    assert not list(tmp_path.glob("*.spool"))


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_line_that_a_crash_cut_off_is_set_aside_and_the_rest_is_replayed(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path, max_bytes=100_000)
    spool.append(records(1, 2))
    spool.release()
    (segment,) = tmp_path.glob("*.spool")
    data = segment.read_bytes()
    segment.write_bytes(data[:cut] + b"\xff" + data[cut + 1 :] + data[:-cut])
    later = Spool(tmp_path, max_bytes=100_000)
    part = later.take(10, 100_000)
    assert part is not None
    assert {record.text for record in part.records} == {record.text for record in records(1, 2)}
    later.done(part)
    later.release()
    assert (tmp_path / "damaged").stat().st_size > 0


LIMITED_SPOOL = """
import json, resource, sys
from pathlib import Path
from plm_shared.ledger import LedgerRecord
from plm_shared.spool import Spool
spool = Spool(Path(sys.argv[1]), max_bytes=1_000_000)
good, refused, later = (LedgerRecord("telemetry_events", json.dumps({"n": n, "x": "x" * 600})) for n in range(3))
spool.append([good])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    spool.append([refused])
except OSError as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.append([later])
spool.release()
spool = Spool(Path(sys.argv[1]), max_bytes=1_000_000)
while (part := spool.take(1, 10_000) if not spool.wait_until_empty(0) else None) is not None:
    print(*(record.columns["n"] for record in part.records))
    spool.done(part)
spool.release()
"""


@pytest.mark.parametrize("limit", [640, 1000])
def test_what_the_disk_refused_is_not_in_the_spool_and_the_rest_goes_on(tmp_path: Path, limit: int) -> None:
    words = [sys.executable, "-c", LIMITED_SPOOL, str(tmp_path), str(limit)]
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["OSError", "0", "2"]
    assert said.stderr == ""
    assert not list(tmp_path.iterdir())


def test_the_spools_folder_and_files_are_for_this_account_only(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=100_000)
    spool.append(records(1))
    (segment,) = (tmp_path / "spool").glob("*.spool")
    assert (segment.stat().st_mode & 0o777, segment.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    spool.release()
