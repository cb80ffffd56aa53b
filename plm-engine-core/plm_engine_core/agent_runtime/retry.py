"""Which refusals and failures are tried again, and after how long. Only the driver repeats a step."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from plm_engine_core.control_plane.errors import StorageUnavailable
from plm_engine_core.control_plane.vocabulary import Reason

Answer = TypeVar("Answer")

MAX_PROPOSALS = 3
"""How often an agent may be refused at one step before its run fails."""

MAX_ATTEMPTS = 6
"""How often one step is attempted at all; to be told "not now" does not count, nor does the loss of a run worker."""

MAX_LOSSES = 20
"""How many run workers may be lost during one step before its run fails: it may be the step that takes them down."""

TRANSIENT = "transient"
"""The code of whatever may succeed later for no stated reason."""

_SOON = (200, 400, 800)
_QUOTA = (1000, 2000)

_BACKOFF_MS: dict[str, tuple[int, ...]] = {
    TRANSIENT: _SOON,
    Reason.RATE_LIMIT_EXCEEDED.value: (1000, 2000, 4000),
    Reason.RESOURCE_LOCKED.value: (1000, 2000, 4000),
    Reason.STORAGE_BUSY.value: (200, 400, 800, 1600),
    # What calls of language models and of hosts fail with elsewhere: who moves an agent here keeps its codes.
    "MODEL_TIMEOUT": _SOON,
    "MODEL_PROVIDER_ERROR": _SOON,
    "MODEL_INVALID_RESPONSE": _SOON,
    "KERNEL_DISPATCH_TIMEOUT": _SOON,
    "MODEL_QUOTA_EXCEEDED": _QUOTA,
    "RATE_LIMIT_EXCEEDED": _QUOTA,
}


@dataclass(frozen=True, kw_only=True)
class RetryDecision:
    """Whether to try again, and how long to wait first."""

    retry: bool
    backoff_ms: int = 0
    reason: str = ""


def classify(error_code: str, attempt: int, *, retry_after_ms: int = 0) -> RetryDecision:
    """Decide on the retry after `attempt` (from 1) failed with `error_code`.

    Back-off doubles and carries up to 25 % jitter, so that many runs do not return at once; a stated `retry_after_ms`
    is the least that is waited. An unknown code is final.

    Raises:
        ValueError: `attempt` is below 1.
    """
    if attempt < 1:
        raise ValueError(f"attempt counts from 1, got {attempt}")
    steps = _BACKOFF_MS.get(error_code)
    if steps is None:
        return RetryDecision(retry=False, reason="unknown_code")
    if attempt > len(steps):
        return RetryDecision(retry=False, reason="max_attempts_exhausted")
    return RetryDecision(retry=True, backoff_ms=max(_jittered(steps[attempt - 1]), retry_after_ms))


def pause_seconds(error_code: str, attempt: int, *, retry_after_ms: int = 0) -> float:
    """How long to wait after `attempt` when it is certain to be repeated; the last back-off holds from there on."""
    steps = _BACKOFF_MS[error_code]
    return max(_jittered(steps[min(attempt, len(steps)) - 1]), retry_after_ms) / 1000


async def patiently(act: Callable[[], Awaitable[Answer]]) -> Answer:
    """Await `act`, again a few times while storage is busy; it must be safe to repeat after a lost reply.

    Raises:
        StorageUnavailable: it stayed so.
    """
    attempt = 1
    while True:
        try:
            return await act()
        except StorageUnavailable:
            decision = classify(Reason.STORAGE_BUSY.value, attempt)
            if not decision.retry:
                raise
        await asyncio.sleep(decision.backoff_ms / 1000)
        attempt += 1


def _jittered(milliseconds: int) -> int:
    return int(milliseconds * random.uniform(1.0, 1.25))  # noqa: S311  # spreads load, protects nothing
