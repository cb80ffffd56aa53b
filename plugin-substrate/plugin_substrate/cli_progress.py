"""Jobs as they go, for people: progress bars on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

from plugin_substrate.cli_job_text import event_as_json, event_line, printable
from plugin_substrate.queue.job import Job, JobEvent, JobStatus
from plugin_substrate.queue.store import JobFilter
from plugin_substrate.stores.job_desk import JobDesk

_PAGE = 200
_ACTIVE = [JobStatus.RUNNING, JobStatus.PENDING]


def follow_job(desk: JobDesk, job_id: str, *, as_json: bool) -> Job:
    """Show a job until it has ended, and return it."""
    console = Console()
    if as_json or not console.is_terminal:
        for event in _events(desk, job_id):
            typer.echo(json.dumps(event_as_json(event)) if as_json else event_line(event))
    else:
        _show_bars(desk, console, lambda: [_job(desk, job_id)], until_ended=True)
    return _job(desk, job_id)


def follow_all(desk: JobDesk, wanted: JobFilter, *, as_json: bool) -> None:
    """Show the jobs that run and wait, until interrupted."""
    console = Console()
    if not as_json and console.is_terminal:
        console.print("What runs and waits; Ctrl-C ends it.")
        _show_bars(desk, console, lambda: desk.store.jobs(wanted, console.height - 3)[::-1], until_ended=False)
        return
    after = desk.store.last_position()
    for _ in desk.news():
        while events := desk.store.queue_events(after, _PAGE):
            after = events[-1].position
            for event in events:
                typer.echo(json.dumps(event_as_json(event)) if as_json else f"{event.job_id} {event_line(event)}")


def active(plugin_instance_id: str, owner: str) -> JobFilter:
    """Return the filter for what runs or waits."""
    return JobFilter(statuses=_ACTIVE, plugin_instance_id=plugin_instance_id, owner=owner)


def _events(desk: JobDesk, job_id: str) -> Iterator[JobEvent]:
    after = 0
    for _ in desk.news():
        ended = _job(desk, job_id).status.terminal  # asked before reading: what happened up to the end is then read
        while events := desk.store.job_events(job_id, after, _PAGE):
            after = events[-1].number
            yield from events
        if ended:
            return


class _Elapsed(ProgressColumn):
    """How long a job runs, or waits, or ran."""

    def render(self, task: Task) -> Text:
        job: Job = task.fields["standing"]
        until = job.completed_at or datetime.now(UTC)
        return Text(str(timedelta(seconds=int((until - (job.started_at or job.submitted_at)).total_seconds()))))


def _show_bars(desk: JobDesk, console: Console, jobs: Callable[[], list[Job]], *, until_ended: bool) -> None:
    bars: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.fields[job]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        _Elapsed(),
    )
    with Progress(*columns, console=console) as progress:
        for _ in desk.news():
            now = jobs()
            for gone in set(bars) - {job.id for job in now}:
                progress.remove_task(bars.pop(gone))
            for job in now:
                if job.id not in bars:
                    bars[job.id] = progress.add_task("", job=job.id[:8], standing=job)
                progress.update(
                    bars[job.id],
                    completed=max(0.0, job.progress),
                    total=1.0 if job.progress >= 0 else None,  # without a total the bar only shows that it lives
                    description=escape(_words(job)),
                    standing=job,
                )
            if until_ended and all(job.status.terminal for job in now):
                return


def _words(job: Job) -> str:
    if job.status is JobStatus.PENDING and job.block_reason is not None:
        return f"pending: {printable(job.block_reason.text)}"
    return f"{job.status.value} {printable(job.status_message)}"


def _job(desk: JobDesk, job_id: str) -> Job:
    kept = desk.store.job(job_id)
    if kept is None:
        raise ValueError(f"job {job_id!r} is no longer kept")
    return kept.job
