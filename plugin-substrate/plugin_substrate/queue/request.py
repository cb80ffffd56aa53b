"""What is asked of the queue: a call, when it may go, how long it may take, and whether it may be repeated."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plugin_substrate.errors import ErrorCategory, JobError
from plugin_substrate.interface import CallContext, is_amount

_MAX_PRIORITY = 10**6
_MAX_SECONDS = 1e9
_MAX_OWNER = 256

BeforeStart = Callable[[], Awaitable[bool]]
OnProgress = Callable[[float, str], object]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Which failures are followed by another attempt, and when.

    An error of one of ``categories`` that calls itself retriable, up to ``max_attempts`` in all. The pause doubles from
    ``base_seconds`` to ``max_seconds``, with a jitter of half of it, and is never shorter than the plugin's own
    ``retry_after_seconds``; where that is over ``max_seconds``, there is no further attempt. With ``on_shortage`` a job
    that met a want of memory is sent once more, after idle workers were evicted and its own was replaced.

    Whatever this says: an attempt whose outcome is unknown, and one on a shortage, is followed by another only when the
    plugin declares itself ``idempotent``.
    """

    max_attempts: int = 3
    categories: frozenset[ErrorCategory] = frozenset({ErrorCategory.TRANSIENT})
    base_seconds: float = 1.0
    max_seconds: float = 300.0
    on_shortage: bool = True

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or not 0 <= self.base_seconds <= self.max_seconds <= _MAX_SECONDS:
            raise ValueError(
                f"max_attempts {self.max_attempts} must be at least 1, and base_seconds {self.base_seconds} from 0 to "
                f"max_seconds {self.max_seconds}, which is at most {_MAX_SECONDS:g}"
            )

    def pause(self, error: JobError, retry_count: int, *, idempotent: bool) -> float | None:
        """Return the seconds to wait before another attempt after ``error``, None when there is none."""
        if not error.retriable or error.category not in self.categories or retry_count + 1 >= self.max_attempts:
            return None
        if not (error.outcome_known or idempotent):
            return None
        told = error.retry_after_seconds if is_amount(error.retry_after_seconds) else None  # a plugin says this
        told = told or 0.0
        if told > self.max_seconds:
            return None
        longest = min(self.max_seconds, self.base_seconds * 2.0 ** min(retry_count, 60))
        return max(told, longest * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, guards nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """One call for the queue, see `JobQueue.submit_request`.

    ``deadline_seconds`` limits a job from its submission to its end, its waiting included; ``no_progress_seconds``
    limits the silence of a running one: each report of progress counts anew. Both end it as ``failed`` with a
    `PluginTimeoutError`.
    """

    plugin_instance_id: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    owner: str = ""
    call: CallContext | None = None
    deadline_seconds: float | None = None
    no_progress_seconds: float | None = None
    retry: RetryPolicy | None = None
    before_start: BeforeStart | None = None
    on_progress: OnProgress | None = None

    def __post_init__(self) -> None:
        for name in ("deadline_seconds", "no_progress_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not (is_amount(seconds) and 0 < seconds <= _MAX_SECONDS):
                raise ValueError(f"{name} must be over 0 and at most {_MAX_SECONDS:g}, not {seconds!r:.80}")
        check_priority(self.priority)
        owner = self.owner
        if not isinstance(owner, str) or not owner.isprintable() or len(owner) > _MAX_OWNER:
            raise ValueError(f"owner must be printable text of at most {_MAX_OWNER} characters, not {owner!r:.80}")


def check_priority(priority: int) -> None:
    """Raise a ValueError for a priority that is no whole number, or too high or low for any use."""
    if not isinstance(priority, int) or not -_MAX_PRIORITY <= priority <= _MAX_PRIORITY:
        raise ValueError(
            f"priority must be a whole number from -{_MAX_PRIORITY} to {_MAX_PRIORITY}, not {priority!r:.80}"
        )
