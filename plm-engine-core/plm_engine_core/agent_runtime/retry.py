"""Which refusals and failures are tried again, and after how long. Only the driver repeats a step."""

from __future__ import annotations

import random
from dataclasses import dataclass

from plm_engine_core.control_plane.vocabulary import Reason

MAX_PROPOSALS = 3
"""How often an agent may be refused at one step before its run fails."""

MAX_ATTEMPTS = 6
"""How often one step is attempted at all, whatever stood in its way."""

_BACKOFF_MS: dict[str, tuple[int, ...]] = {
    "transient": (200, 400, 800),
    Reason.RATE_LIMIT_EXCEEDED.value: (1000, 2000, 4000),
    Reason.STORAGE_BUSY.value: (200, 400, 800, 1600),
    Reason.GRANT_EXPIRED.value: (200, 400, 800),
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
    jittered = int(steps[attempt - 1] * random.uniform(1.0, 1.25))  # noqa: S311  # spreads load, protects nothing
    return RetryDecision(retry=True, backoff_ms=max(jittered, retry_after_ms))
