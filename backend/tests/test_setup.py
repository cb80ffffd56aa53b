"""The set-up: done once, repaired when it was interrupted, made anew when it does not fit, clear when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    for name in ("dev", ".venv-place"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "dev" / "setup.py", folder / "dev")
    return folder


def set_up(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(command(project, *arguments), **environment)


def run(argv: list[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_set_up_waits_for_the_tools_of_one_that_was_ended_alone(project: Path, number: signal.Signals) -> None:
    pipe = project / "backend" / "pipe"
    os.mkfifo(pipe)
    require(project, "-r pipe")
    ended = subprocess.Popen(command(project), stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True)
    with pipe.open("wb"):
        require(project)
        ended.send_signal(number)  # a killed set-up leaves its pip behind; an interrupted one takes it along
        said = ended.communicate(timeout=60)[1]
        again = subprocess.Popen(command(project), stderr=subprocess.PIPE, encoding="utf-8")
    assert ended.returncode == (1 if number == signal.SIGINT else -number)
    assert (said.splitlines()[-1] == "set-up: interrupted; the next one starts anew.") == (number == signal.SIGINT)
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0, said
    assert "virtual environment" in said
    assert "is current" in set_up(project).stderr


def one_sentence(failed: subprocess.CompletedProcess[str]) -> str:
    """What is said beside the stages, which must be one line."""
    assert failed.returncode == 1
    stages = [line for line in failed.stderr.splitlines() if line.startswith("  ") or " with Python " in line]
    (sentence,) = [line for line in failed.stderr.splitlines() if line not in stages]
    assert sentence.startswith("set-up: ")
    return sentence


def test_a_set_up_without_a_network_says_so_and_goes_on_with_one(project: Path, machine: Any) -> None:
    require(project, "nothing-of-this-name")
    failed = run(machine.without_network(*command(project)), PIP_RETRIES="1")
    assert "the package index cannot be reached; check the network" in one_sentence(failed)
    require(project)
    assert set_up(project).returncode == 0


def test_a_set_up_on_a_full_disk_says_so_and_goes_on_when_there_is_room(project: Path, machine: Any) -> None:
    disk = machine.small_disk(project / ".venv-place")
    there = ["--venv", str(disk.folder / "venv")]
    failed = run(disk.here(*command(project, *there)))
    assert f"no space left in {disk.folder / 'venv'}" in one_sentence(failed)
    disk.grow()
    again = run(disk.here(*command(project, *there)))
    assert again.returncode == 0, again.stderr


def test_an_ordinary_user_sets_up_a_clone_of_their_own(project: Path, machine: Any, open_folder: Path) -> None:
    theirs = open_folder / "mein Projekt"
    shutil.copytree(project, theirs)
    for path in (theirs, *theirs.rglob("*")):
        os.chown(path, *machine.ordinary_user)
    done = run(machine.as_ordinary_user(*command(theirs)), HOME=str(open_folder))
    assert done.returncode == 0, done.stderr
    assert (theirs / ".venv" / "bin" / "pip").stat().st_uid == machine.ordinary_user[0]


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


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_the_modules_is_told_what_to_install(project: Path, module: str) -> None:
    without = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['setup.py']; import runpy; "
    path = str(project / "dev" / "setup.py")
    done = subprocess.run(
        [sys.executable, "-c", f"{without} runpy.run_path({path!r}, run_name='__main__')"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert f"lacks the module {module}; on Debian and Ubuntu install python3." in done.stderr.splitlines()[-1]
