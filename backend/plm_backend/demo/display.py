"""What the demo shows on a terminal. Progress bars move on a terminal only; elsewhere each line is written once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_STEP_MARKS = {
    "succeeded": "[green]done[/]",
    "failed": "[red]failed[/]",
    "denied": "[red]denied[/]",
    "cancelled": "[yellow]cancelled[/]",
}


class Display:
    """Writes the story; `quiet` keeps it to the results, for machines."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(quiet=quiet, highlight=False)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._messages: dict[str, str] = {}
        self.stages: list[dict[str, Any]] = []

    def say(self, text: str = "") -> None:
        """One line, however long, so that it can be copied; markup allowed."""
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time one stage of the set-up; what the block puts into the record is shown with it."""
        record: dict[str, Any] = {"stage": name}
        started = time.perf_counter()
        yield record
        record["seconds"] = round(time.perf_counter() - started, 2)
        self.stages.append(record)
        size = f", {megabytes(record['bytes'])}" if record.get("bytes") else ""
        note = f", {record['note']}" if record.get("note") else ""
        self.say(f"  {name:<34} {record['seconds']:>6.2f} s{size}{note}")

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Live progress of the steps of one run."""
        columns = (
            TextColumn("  {task.fields[step]:<12}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %  {task.description}"),
            TimeElapsedColumn(),
        )
        live = self._console.is_terminal and not self._console.quiet
        with Progress(*columns, console=self._console, disable=not live, transient=True) as progress:
            self._progress, self._tasks, self._messages = progress, {}, {}
            yield
        self._progress = None

    def step_progress(self, step_id: str, fraction: float, message: str) -> None:
        """A step began, or its plugin reports how far it is; a negative fraction says that nobody knows."""
        if self._progress is None:
            return
        self._messages[step_id] = message
        if step_id not in self._tasks:
            self._tasks[step_id] = self._progress.add_task("", total=None, step=step_id)
        description = escape(message[:60])
        if fraction >= 0:
            self._progress.update(
                self._tasks[step_id], total=1.0, completed=min(1.0, fraction), description=description
            )
        else:
            self._progress.update(self._tasks[step_id], description=description)

    def step_done(self, step_id: str, capability: str, state: str, seconds: float, note: str = "") -> None:
        """A step has ended."""
        if self._progress is not None and step_id in self._tasks:
            self._progress.remove_task(self._tasks.pop(step_id))
        mark = _STEP_MARKS.get(state, escape(state))
        last = self._messages.pop(step_id, "")
        notes = escape(", ".join(part for part in (note, last) if part))
        self.say(f"  {step_id:<12} {capability:<16} {mark}  {seconds:.2f} s  {notes}")

    def approval(self, ticket: Mapping[str, Any]) -> None:
        """Exactly what would be written, and until when it may be decided."""
        if self._progress is not None:
            self._progress.stop()
        body = escape(_lines(ticket["arguments"]))
        self._console.print(
            Panel(
                f"{body}\n\n[dim]digest {ticket['digest'][:16]}…  policy {ticket['policy_digest'][:16]}…  "
                f"decide before {ticket['deadline']}[/]",
                title=f"approval asked: {escape(ticket['capability'])} on {escape(ticket['resource'])} "
                f"({ticket['risk']} risk, {ticket['tier']})",
                border_style="yellow",
            )
        )

    def pairs(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Names and values, a line each."""
        width = max((len(name) for name, _ in rows), default=0)
        self.say(f"  [bold]{escape(title)}[/]")
        for name, value in rows:
            self.say(f"    {escape(name):<{width}}  {escape(value)}")

    def ask(self, question: str) -> bool:
        """Ask the person at the terminal."""
        return self._console.input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


def _lines(arguments: Mapping[str, Any]) -> str:
    """The exact values as JSON, an item of a list on a line of its own."""
    parts = []
    for name, value in arguments.items():
        if isinstance(value, list) and value:
            items = ",\n  ".join(json.dumps(item, ensure_ascii=False, sort_keys=True) for item in value)
            parts.append(f"{name}: [\n  {items}\n]")
        else:
            parts.append(f"{name}: {json.dumps(value, ensure_ascii=False, sort_keys=True)}")
    return "\n".join(parts)


def megabytes(size: int) -> str:
    """Bytes as people read them: 1 MB is 10^6 bytes."""
    return f"{size / 1e6:.1f} MB"
