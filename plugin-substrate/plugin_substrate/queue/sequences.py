"""Jobs one after another: what was asked, what each step gave, and how a step uses what an earlier one gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from plugin_substrate.errors import JobError, PluginInputError
from plugin_substrate.queue.results import loaded


class SequenceStatus(StrEnum):
    """Where a sequence stands."""

    RUNNING = "running"  #: a step waits or runs
    COMPLETED = "completed"  #: all steps were tried; without ``fail_fast`` some may have failed
    FAILED = "failed"  #: a step failed, and with ``fail_fast`` none came after it
    CANCELLED = "cancelled"  #: it, or one of its jobs, was cancelled

    @property
    def terminal(self) -> bool:
        """Whether a sequence stays in this state."""
        return self is not SequenceStatus.RUNNING


@dataclass(frozen=True)
class FromStep:
    """Stands in the arguments of a step for what an earlier one gave: its result, or what ``path`` leads to in it.

    ``FromStep(0, "rows", 2)`` is ``result["rows"][2]`` of the first step. It may stand anywhere in lists and dicts.
    """

    index: int
    path: tuple[str | int, ...] = ()

    def __init__(self, index: int, *path: str | int) -> None:
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "path", path)


@dataclass(frozen=True, kw_only=True)
class SequenceStep:
    """One call of a sequence. A priority of 0 is that of the sequence."""

    plugin_instance_id: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What became of a step. ``job_id`` is empty where no job could be made of it."""

    job_id: str
    success: bool
    result: Any = None
    error: JobError | None = None


@dataclass(frozen=True, kw_only=True)
class JobSequence:
    """A sequence at one moment; ``results`` has one entry for each step that has ended."""

    id: str
    steps: tuple[SequenceStep, ...]
    status: SequenceStatus = SequenceStatus.RUNNING
    priority: int = 0
    owner: str = ""
    fail_fast: bool = True
    results: tuple[StepResult, ...] = ()
    current_job_id: str | None = None
    cancel_requested: bool = False
    submitted_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    completed_at: datetime | None = None


def check_references(steps: Sequence[SequenceStep]) -> None:
    """Raise a `PluginInputError` for a step that refers to itself, to a later one or to none."""
    for index, step in enumerate(steps):
        try:
            references = _references((step.args, step.kwargs))
        except RecursionError:
            place = f"steps[{index}]"
            raise PluginInputError(f"step {index} is nested too deeply", fields_invalid=[place]) from None
        for reference in references:
            if not 0 <= reference.index < index:
                raise PluginInputError(
                    f"step {index} refers to step {reference.index}, which does not come before it",
                    fields_invalid=[f"steps[{index}]"],
                )


def resolved(value: Any, resolve: Callable[[FromStep], Any]) -> Any:
    """Return the value with what ``resolve`` gives in the place of every `FromStep`."""
    if isinstance(value, FromStep):
        return resolve(value)
    if isinstance(value, Mapping):
        return {key: resolved(item, resolve) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(resolved(item, resolve) for item in value)
    return value


def result_of(results: Sequence[StepResult], reference: FromStep) -> Any:
    """Return what a reference leads to; a `PluginInputError` when that is nothing, or its step failed."""
    step = results[reference.index]
    if not step.success:
        raise PluginInputError(f"the result of step {reference.index} is needed, and that step failed")
    value = loaded(step.result)
    for key in reference.path:
        try:
            value = value[key]
        except (LookupError, TypeError):
            place = "".join(f"[{each!r}]" for each in reference.path)
            raise PluginInputError(f"the result of step {reference.index} has no {place}") from None
    return value


def _references(value: Any) -> list[FromStep]:
    if isinstance(value, FromStep):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [found for item in value for found in _references(item)]
    return []
