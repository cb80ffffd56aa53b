"""``cjm-ctl jobs`` and ``cjm-ctl submit``: the jobs of a host, from outside it, while it runs or not.

Status 0: done, 1: refused, unknown, or a followed job that did not complete, 2: wrong usage.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from plugin_substrate.cli_job_text import (
    end_line,
    event_as_json,
    event_line,
    job_as_json,
    job_lines,
    job_table,
    printable,
)
from plugin_substrate.cli_progress import active, follow_all, follow_job
from plugin_substrate.cli_settings import DataDir, data_folder, fail
from plugin_substrate.configuration import get_config
from plugin_substrate.errors import PluginError
from plugin_substrate.manager import PluginManager
from plugin_substrate.queue.job import Job, JobEventType, JobStatus
from plugin_substrate.queue.job_queue import JobQueue
from plugin_substrate.queue.request import JobRequest
from plugin_substrate.queue.store import JobFilter
from plugin_substrate.stores.job_desk import JobDesk
from plugin_substrate.stores.jobs import LocalJobStore

JOBS_FILE = "jobs.db"

_ANSWER_SECONDS = 30.0
_MANY_EVENTS = 1_000_000

jobs = typer.Typer(name="jobs", help="Look at the jobs of a host, and cancel or repeat them.", no_args_is_help=True)

File = Annotated[
    Path | None, typer.Option("--file", help=f"The file of jobs. Default: {JOBS_FILE} in the data folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: one object, or with --follow one a line.")]
JobId = Annotated[str, typer.Argument(help="The job's id, or how it begins or ends.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until it has ended; bars on a terminal.")]
Owner = Annotated[str, typer.Option("--owner", help="Whose jobs.")]


@jobs.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option("--status", help="How they stand.")] = None,
    owner: Owner = "",
    instance: Annotated[str, typer.Option("--instance", help="Of which plugin instance.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what runs and waits until interrupted.")] = False,
    as_json: AsJson = False,
    file: File = None,
    data_dir: DataDir = None,
) -> None:
    """List jobs, those submitted last first."""
    with _desk(file, data_dir) as desk:
        if follow:
            follow_all(desk, active(instance, owner), as_json=as_json)
            return
        statuses = [status] if status is not None else []
        found = desk.store.jobs(JobFilter(statuses=statuses, owner=owner, plugin_instance_id=instance), limit)
        if as_json:
            _print({"jobs": [job_as_json(job) for job in found]})
            return
        if not found:
            typer.echo(f"no such jobs in {desk.path}", err=True)
            return
        for line in job_table(found):
            typer.echo(line)


@jobs.command()
def show(
    job_id: JobId, follow: Follow = False, as_json: AsJson = False, file: File = None, data_dir: DataDir = None
) -> None:
    """Show one job and its events."""
    with _desk(file, data_dir) as desk:
        found = desk.find(job_id)
        if follow:
            _end_as(follow_job(desk, found, as_json=as_json), as_json=as_json)
            return
        job, events = _job(desk, found), desk.store.job_events(found, 0, _MANY_EVENTS)
        if as_json:
            _print({**job_as_json(job), "events": [event_as_json(event) for event in events]})
            return
        for line in job_lines(job):
            typer.echo(line)
        for event in events:
            typer.echo(f"  {event.number:4} {event_line(event)}")


@jobs.command()
def why(job_id: JobId, as_json: AsJson = False, file: File = None, data_dir: DataDir = None) -> None:
    """Say what a waiting job waits for: the resource, how much is needed and free, and which jobs hold it."""
    with _desk(file, data_dir) as desk:
        found = desk.find(job_id)
        job = _job(desk, found)
        answer: dict[str, Any] = {"status": job.status.value, "reason": None}
        if job.status is JobStatus.PENDING:
            no_host = {"resource": "host", "text": "no host runs over this file"}
            told = _ask(desk, "why", {"job_id": found}) if desk.ring() else None
            answer = told or {**answer, "reason": no_host}
        if as_json:
            _print({"id": found, **answer})
        else:
            reason = answer["reason"]
            typer.echo(printable(reason["text"]) if reason else f"it does not wait: it is {answer['status']}")


@jobs.command()
def logs(
    job_id: JobId,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="At most so many, the last.")] = 100,
    follow: Follow = False,
    as_json: AsJson = False,
    file: File = None,
    data_dir: DataDir = None,
) -> None:
    """Print what the plugin wrote in a job. Of a talkative one, the instance's log has the rest."""
    with _desk(file, data_dir) as desk:
        found = desk.find(job_id)
        if follow:
            _end_as(follow_job(desk, found, as_json=as_json), as_json=as_json)
            return
        events = desk.store.job_events(found, 0, _MANY_EVENTS)
        written = [event.payload["line"] for event in events if event.type is JobEventType.LOG_APPENDED][-lines:]
        if as_json:
            _print({"id": found, "lines": written})
        else:
            for line in written:
                typer.echo(printable(line))


@jobs.command()
def cancel(job_id: JobId, as_json: AsJson = False, file: File = None, data_dir: DataDir = None) -> None:
    """End a job, through its plugin and then by force; where no host runs, the next one will."""
    with _desk(file, data_dir) as desk:
        found = desk.find(job_id)
        answer = _ask(desk, "cancel", {"job_id": found})
        if as_json:
            _print({"id": found, "cancelled": None if answer is None else answer["cancelled"]})
        elif answer is None:
            typer.echo(f"{found}: no host runs; the next one will cancel it")
        elif answer["cancelled"]:
            typer.echo(f"{found}: cancelled")
        else:
            fail(f"{found}: it had ended")


@jobs.command()
def retry(
    job_id: JobId, follow: Follow = False, as_json: AsJson = False, file: File = None, data_dir: DataDir = None
) -> None:
    """Submit an ended job again, as a new one."""
    with _desk(file, data_dir) as desk:
        _submitted(desk, _ask(desk, "retry", {"job_id": desk.find(job_id)}), follow=follow, as_json=as_json)


def submit(
    instance: Annotated[str, typer.Argument(help="The plugin instance; the default one has the plugin's name.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="name=value; a value is JSON, or else text.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="The higher goes first.")] = 0,
    owner: Owner = "",
    deadline: Annotated[float | None, typer.Option("--deadline", help="Seconds from now to its end.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Be the host: load the plugin here and run what waits.")] = False,
    follow: Follow = False,
    as_json: AsJson = False,
    file: File = None,
    data_dir: DataDir = None,
) -> None:
    """Submit a job to the host that runs, or to the next one; with --run this command is the host."""
    request = {
        "plugin_instance_id": instance,
        "kwargs": _arguments(arguments or []),
        "priority": priority,
        "owner": owner,
        "deadline_seconds": deadline,
    }
    with _desk(file, data_dir) as desk:
        if run:
            folder = data_folder(data_dir)
            asyncio.run(_run_here(folder, desk.path, request, follow=follow, as_json=as_json))
        else:
            _submitted(desk, _ask(desk, "submit", request), follow=follow, as_json=as_json)


async def _run_here(folder: Path, file: Path, request: Mapping[str, Any], *, follow: bool, as_json: bool) -> None:
    """Be a host until one job has ended."""
    async with PluginManager(data_dir=folder, models_dir=get_config().models_dir) as manager:
        manager.discover_manifests()
        meta = manager.get_discovered_meta(request["plugin_instance_id"])
        if meta is None:
            raise ValueError(f"no plugin {request['plugin_instance_id']!r} is installed in {folder}")
        await manager.load_plugin_async(meta)
        async with JobQueue(manager, store=LocalJobStore(file)) as queue:
            job_id = await queue.submit_request(JobRequest(**request))
            if follow:
                async for event in queue.events(job_id):
                    typer.echo(json.dumps(event_as_json(event)) if as_json else event_line(event))
            job = await queue.wait_for_job(job_id)
    _end_as(job, as_json=as_json)


def _ask(desk: JobDesk, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Ask the host; None when none runs. What it refuses ends the command."""
    answer = desk.answer(desk.ask(verb, arguments), _ANSWER_SECONDS)
    if answer is not None and "error" in answer:
        fail(answer["error"])
    return answer


def _submitted(desk: JobDesk, answer: dict[str, Any] | None, *, follow: bool, as_json: bool) -> None:
    if answer is None:
        if as_json:
            _print({"id": None})
        else:
            typer.echo("no host runs over this file; the next one will take it up, or refuse it", err=True)
        return
    job_id = answer["job_id"]
    if follow:
        _end_as(follow_job(desk, job_id, as_json=as_json), as_json=as_json)
    elif as_json:
        _print({"id": job_id})
    else:
        typer.echo(job_id)


def _end_as(job: Job, *, as_json: bool) -> None:
    """Print how a job ended, and end likewise."""
    if as_json:
        typer.echo(json.dumps(job_as_json(job)))
    else:
        typer.echo(end_line(job))
    if job.status is not JobStatus.COMPLETED:
        raise typer.Exit(1)


def _arguments(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{pair!r} is not name=value")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _job(desk: JobDesk, job_id: str) -> Job:
    kept = desk.store.job(job_id)
    if kept is None:
        raise ValueError(f"job {job_id!r} is no longer kept")
    return kept.job


def _print(answer: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(answer, indent=2))


@contextmanager
def _desk(file: Path | None, data_dir: Path | None) -> Iterator[JobDesk]:
    """Open the file of jobs; what goes wrong ends the command with its reason."""
    desk = JobDesk(file or data_folder(data_dir) / JOBS_FILE)
    try:
        yield desk
    except (PluginError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        desk.store.close_reader()
