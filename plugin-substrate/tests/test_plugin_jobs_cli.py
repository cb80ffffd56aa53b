"""``cjm-ctl jobs`` and ``submit``, beside a host that runs and without one."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from job_hosts import HostProcess, effects, plugin_folder, write_manifests
from plugin_substrate import Job, JobStatus, PluginMeta
from plugin_substrate.cli import app
from plugin_substrate.cli_job_text import job_table
from typer.testing import CliRunner

COMMAND = Path(sys.executable).with_name("cjm-ctl")


@pytest.fixture
def folder(tmp_path: Path, probe_meta: Callable[..., PluginMeta]) -> Path:
    write_manifests(tmp_path, probe_meta("Jobber", "jobber", "plain"))
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], HostProcess]]:
    """Start a host over the folder."""
    hosts: list[HostProcess] = []

    def make() -> HostProcess:
        hosts.append(HostProcess(folder))
        return hosts[-1]

    yield make
    for host in hosts:
        host.kill()


@pytest.fixture
def ctl(folder: Path) -> Callable[..., Any]:
    """Run a command with --json and return what it prints, or its words when it fails."""

    def run(*arguments: str, status: int = 0) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--json", "--file", str(folder / "jobs.db")])
        assert result.exit_code == status, result.output
        return json.loads(result.stdout) if status == 0 else result.stderr

    return run


def test_a_job_is_submitted_to_a_host_that_runs_and_looked_at(
    ctl: Callable[..., Any], start: Callable[[], HostProcess]
) -> None:
    host = start()
    job_id = ctl("submit", "plain", "action=job.steps", "count=2", "lines=3", "--priority", "2", "--owner", "acme")[
        "id"
    ]
    assert host.ask("wait", job_id=job_id) == "completed"
    (listed,) = ctl("jobs", "list", "--status", "completed", "--owner", "acme")["jobs"]
    assert (listed["id"], listed["result"], listed["priority"], listed["progress"]) == (job_id, 2, 2, 1.0)
    shown = ctl("jobs", "show", job_id[:10])
    assert ctl("jobs", "show", job_id[-6:]) == shown
    assert [event["number"] for event in shown["events"]] == list(range(1, len(shown["events"]) + 1))
    assert ctl("jobs", "logs", job_id, "--lines", "2")["lines"] == ["line 1", "line 2"]
    assert ctl("jobs", "why", job_id) == {"id": job_id, "status": "completed", "reason": None}
    again = ctl("jobs", "retry", job_id)["id"]
    assert host.ask("wait", job_id=again) == "completed"
    assert ctl("jobs", "list", "--limit", "1")["jobs"][0]["id"] == again


def test_why_a_job_waits_is_said_and_it_can_be_cancelled(
    ctl: Callable[..., Any], start: Callable[[], HostProcess]
) -> None:
    host = start()
    runs = ctl("submit", "plain", "action=job.gated", "name=one")["id"]
    waits = ctl("submit", "plain", "action=job.gated", "name=two")["id"]
    host.ask("wait_until_at_work", job_id=runs)
    reason = ctl("jobs", "why", waits)["reason"]
    assert (reason["resource"], reason["needed"], reason["holders"]) == ("slots", 1, [runs])
    for job_id in (waits, runs):
        assert ctl("jobs", "cancel", job_id) == {"id": job_id, "cancelled": True}
        assert host.ask("status", job_id=job_id) == "cancelled"
    assert ctl("jobs", "cancel", runs)["cancelled"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "nobody"], "no plugin is loaded as 'nobody'"),
        (["submit", "plain", "--deadline", "-1"], "deadline_seconds must be over 0"),
        (["jobs", "show", "f00"], "begins or ends with 'f00'"),
        (["jobs", "retry", ""], "begins or ends with ''"),
    ],
)
def test_what_cannot_be_done_ends_with_status_1_and_the_reason(
    ctl: Callable[..., Any], start: Callable[[], HostProcess], arguments: list[str], words: str
) -> None:
    start()
    assert words in ctl(*arguments, status=1)


def test_a_malformed_argument_is_wrong_usage(ctl: Callable[..., Any]) -> None:
    assert "is not name=value" in ctl("submit", "plain", "count", status=2)


def test_what_is_asked_while_no_host_runs_is_done_by_the_next_once(
    folder: Path, ctl: Callable[..., Any], start: Callable[[], HostProcess]
) -> None:
    assert ctl("jobs", "list") == {"jobs": []}, "where there is no file there are no jobs"
    assert ctl("submit", "plain", "action=job.effect", "name=once") == {"id": None}
    host = start()
    deadline = time.monotonic() + 60
    while not (found := ctl("jobs", "list")["jobs"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert host.ask("wait", job_id=found[0]["id"]) == "completed"
    host.kill()
    waiting = ctl("jobs", "why", found[0]["id"])
    assert waiting["status"] == "completed"
    host = start()
    host.ask("drain")
    assert effects(folder, "plain") == ["once"]
    assert len(ctl("jobs", "list")["jobs"]) == 1


def test_a_job_can_be_followed_by_lines_and_on_a_terminal_by_bars(
    folder: Path, start: Callable[[], HostProcess]
) -> None:
    host = start()
    job_id = host.ask("submit", instance="plain", kwargs={"action": "job.gated", "name": "bar"})
    command = [str(COMMAND), "jobs", "show", job_id, "--follow", "--file", str(folder / "jobs.db")]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT) as on_terminal:
        os.close(theirs)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as in_pipe:
            host.ask("wait_until_at_work", job_id=job_id)
            seen = b""
            while b"did bar" not in seen:
                seen += os.read(ours, 10_000)
            (plugin_folder(folder, "plain") / "go-bar").touch()
            with suppress(OSError):
                while more := os.read(ours, 10_000):
                    seen += more
            lines = in_pipe.communicate()[0].splitlines()
    os.close(ours)
    assert (on_terminal.returncode, in_pipe.returncode) == (0, 0)
    assert "━" in seen.decode()
    assert "25%" in seen.decode()
    assert "━" not in "".join(lines)
    assert [line.split(" ", 1)[1] for line in lines[-3:]] == [
        "25% did bar",
        "running -> completed",
        'completed  "bar"',
    ]


def test_a_list_for_people_says_why_jobs_failed_and_what_is_not_known(
    folder: Path, start: Callable[[], HostProcess]
) -> None:
    def shown(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["jobs", *arguments, "--file", str(folder / "jobs.db")])
        assert result.exit_code == 0, result.output
        return result.output

    assert "no such jobs in" in shown("list"), "an empty list is no silence"
    host = start()
    job_id = host.ask("submit", instance="plain", kwargs={"action": "job.flaky", "failures": 1})
    host.ask("wait", job_id=job_id)
    header, line = shown("list").splitlines()
    assert header.startswith("id ")
    assert line.startswith(f"{job_id}  failed")
    assert line.endswith("attempt 1")
    broken = host.ask("submit", instance="plain", kwargs={"action": "job.steps"})
    host.ask("wait", job_id=broken)
    lines = shown("show", broken).splitlines()
    assert any(each.startswith("error ") and "'count'" in each for each in lines)
    assert any(each.startswith("  Traceback") for each in lines)
    assert not any("\\n" in each for each in lines), "a traceback is lines, not one line of JSON"
    vague = Job(id="a", plugin_instance_id="plain", progress=-1.0, status=JobStatus.RUNNING, status_message="\x1b[2J")
    _, line = job_table([vague])
    assert line.split()[:5] == ["a", "running", "?", "plain", "-"]
    assert "\x1b" not in line


def test_a_command_can_be_the_host(tmp_path: Path, probe_meta: Callable[..., PluginMeta]) -> None:
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    write_manifests(manifests, probe_meta("Jobber", "jobber", "plain"))

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["submit", "plain", *arguments, "--run", "--json", "--data-dir", str(tmp_path)])

    done = run("action=job.value", 'value={"a": [1]}')
    assert (done.exit_code, json.loads(done.stdout)["result"]) == (0, {"a": [1]})
    failed = run("action=job.flaky", "failures=1")
    assert (failed.exit_code, json.loads(failed.stdout)["status"]) == (1, "failed")
    late = json.loads(run("action=job.silent", "--deadline", "1.5").stdout)
    assert (late["status"], late["error"]["error_type"]) == ("failed", "PluginTimeoutError")
    followed = [json.loads(line) for line in run("action=job.steps", "count=1", "--follow").stdout.splitlines()]
    assert [each.get("number") for each in followed] == [1, 2, 3, None]
