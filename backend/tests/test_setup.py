"""The set-up: done once, repaired when it was interrupted, made anew when it does not fit, clear when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["plm-shared", "plm-engine-core", "plugin-substrate", "backend"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A workspace of the same shape that needs no packages, in a folder with a space and a letter that is not ASCII."""
    folder = tmp_path / "ein Übungsprojekt"
    for package in PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "pyproject.toml").touch()
    for name in ("requirements.txt", "requirements-dev.txt"):
        (folder / "backend" / name).touch()
    (folder / "dev").mkdir()
    shutil.copy(ROOT / "dev" / "setup.py", folder / "dev")
    return folder


def set_up(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(project, *arguments),
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )


def command(project: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(project / "dev" / "setup.py"), *arguments]


def require(project: Path, *requirements: str) -> None:
    (project / "backend" / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")


def mark(project: Path) -> Path:
    """A file that is there as long as the environment is not made anew."""
    path = project / ".venv" / "mark"
    path.touch()
    return path


def test_a_second_set_up_finds_the_first_and_does_nothing(project: Path) -> None:
    first = set_up(project)
    record = project / ".venv" / "plm-setup.json"
    assert first.returncode == 0, first.stderr
    assert f"{json.loads(record.read_bytes())['bytes']} bytes" in first.stderr
    written = record.stat()
    second = set_up(project)
    assert second.returncode == 0
    assert "is current" in second.stderr
    assert record.stat() == written
    assert first.stdout == second.stdout == "", "standard output belongs to what comes after the set-up"


def test_changed_requirements_are_installed_into_the_same_environment(project: Path) -> None:
    set_up(project)
    kept = mark(project)
    require(project, "# another line")
    again = set_up(project)
    assert again.returncode == 0
    assert "packages" in again.stderr
    assert kept.exists()
    assert "is current" in set_up(project).stderr


def test_tools_for_developers_are_added_to_a_set_up_without_them(project: Path) -> None:
    set_up(project)
    assert "is current" not in set_up(project, "--dev").stderr
    assert "is current" in set_up(project, "--dev").stderr
    assert "is current" in set_up(project).stderr, "what has more than is asked for is current"


def test_a_set_up_that_was_killed_is_made_anew(project: Path) -> None:
    set_up(project)
    kept = mark(project)
    pipe = project / "backend" / "pipe"
    os.mkfifo(pipe)
    require(project, "-r pipe")
    killed = subprocess.Popen(command(project), stderr=subprocess.DEVNULL, start_new_session=True)
    with pipe.open("wb"):  # opens once pip reads it: the set-up is in its middle
        os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    require(project)
    repaired = set_up(project)
    assert repaired.returncode == 0, repaired.stderr
    assert "virtual environment" in repaired.stderr
    assert not kept.exists()


def test_a_moved_workspace_gets_a_new_environment(project: Path) -> None:
    set_up(project)
    moved = project.rename(project.with_name("moved"))
    kept = mark(moved)
    again = set_up(moved)
    assert again.returncode == 0, again.stderr
    assert "is current" not in again.stderr
    shebang = (moved / ".venv" / "bin" / "pip").read_text(encoding="utf-8")
    assert str(project) not in shebang, "commands that name the old folder would not start"
    assert not kept.exists()


def test_two_set_ups_at_once_make_one_environment(project: Path) -> None:
    both = [subprocess.Popen(command(project), stderr=subprocess.PIPE, encoding="utf-8") for _ in range(2)]
    told = sorted(process.communicate(timeout=120)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0], told
    assert ["ready in" in text for text in told].count(True) == 1
    assert ["is current" in text for text in told].count(True) == 1


def test_an_index_that_cannot_be_reached_is_named_as_the_cause_and_the_next_set_up_repairs(project: Path) -> None:
    require(project, "nothing-of-this-name")
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "PIP_CONFIG_FILE": os.devnull}
    failed = set_up(project, **nowhere)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("set-up: the package index cannot be reached")
    require(project)
    assert set_up(project).returncode == 0


def test_a_folder_that_is_no_environment_is_never_replaced(project: Path) -> None:
    precious = project / ".venv" / "precious"
    precious.parent.mkdir()
    precious.touch()
    refused = set_up(project)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].endswith(
        "is not a virtual environment; move it away, or name another with --venv."
    )
    assert set_up(project).returncode == 1, "the refusal is not taken for an interrupted set-up"
    assert precious.exists()


def test_a_python_without_the_modules_is_told_what_to_install(project: Path) -> None:
    without = "import sys; sys.modules['ensurepip'] = None; sys.argv = ['setup.py']; import runpy; "
    path = str(project / "dev" / "setup.py")
    done = subprocess.run(
        [sys.executable, "-c", f"{without} runpy.run_path({path!r}, run_name='__main__')"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert "lacks the module ensurepip; on Debian and Ubuntu install python3." in done.stderr.splitlines()[-1]
