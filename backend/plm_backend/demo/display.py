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
from rich.table import Table

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
        self.stages: list[dict[str, Any]] = []

    def say(self, text: str = "") -> None:
        """One line; markup allowed."""
        self._console.print(text)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time one stage of the set-up; what the block puts into the record is shown with it."""
        record: dict[str, Any] = {"stage": name}
        started = time.perf_counter()
        yield record
        record["seconds"] = round(time.perf_counter() - started, 2)
        self.stages.append(record)
        size = f", {megabytes(record['bytes'])} installed" if record.get("bytes") else ""
        note = f", {record['note']}" if record.get("note") else ""
        self._console.print(f"  {name:<34} {record['seconds']:>6.2f} s{size}{note}")

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
            self._progress, self._tasks = progress, {}
            yield
        self._progress = None

    def step_progress(self, step_id: str, fraction: float, message: str) -> None:
        """A plugin reports how far it is."""
        if self._progress is None:
            return
        if step_id not in self._tasks:
            self._tasks[step_id] = self._progress.add_task("", total=1.0, step=step_id)
        completed = max(0.0, min(1.0, fraction))
        self._progress.update(self._tasks[step_id], completed=completed, description=escape(message[:60]))

    def step_done(self, step_id: str, capability: str, state: str, seconds: float, note: str = "") -> None:
        """A step has ended."""
        if self._progress is not None and step_id in self._tasks:
            self._progress.remove_task(self._tasks.pop(step_id))
        mark = _STEP_MARKS.get(state, escape(state))
        self._console.print(f"  {step_id:<12} {capability:<16} {mark}  {seconds:.2f} s  {escape(note)}")

    def approval(self, ticket: Mapping[str, Any]) -> None:
        """Exactly what would be written, and until when it may be decided."""
        if self._progress is not None:
            self._progress.stop()
        body = escape(json.dumps(ticket["arguments"], indent=2, ensure_ascii=False))
        self._console.print(
            Panel(
                f"{body}\n\n[dim]digest {ticket['digest'][:16]}…  policy {ticket['policy_digest'][:16]}…  "
                f"decide before {ticket['deadline']}[/]",
                title=f"approval asked: {escape(ticket['capability'])} on {escape(ticket['resource'])} "
                f"({ticket['risk']} risk, {ticket['tier']})",
                border_style="yellow",
            )
        )

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Names and values."""
        table = Table(title=title, show_header=False, title_justify="left", pad_edge=False)
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        self._console.print(table)

    def ask(self, question: str) -> bool:
        """Ask the person at the terminal."""
        return self._console.input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


def megabytes(size: int) -> str:
    """Bytes as people read them: 1 MB is 10^6 bytes."""
    return f"{size / 1e6:.1f} MB"
