"""What is tried again, when, and how often: the table, its jitter, and what a stated wait does to it."""

from __future__ import annotations

import pytest
from plm_engine_core.agent_runtime.retry import TRANSIENT, classify, patiently, pause_seconds
from plm_engine_core.control_plane.errors import Conflict, StorageUnavailable
from plm_engine_core.control_plane.vocabulary import Reason

RATE, LOCKED, BUSY = (
    Reason.RATE_LIMIT_EXCEEDED.value,
    Reason.RESOURCE_LOCKED.value,
    Reason.STORAGE_BUSY.value,
)


@pytest.mark.parametrize(
    ("code", "waits"),
    [
        (TRANSIENT, [200, 400, 800]),
        (RATE, [1000, 2000, 4000]),
        (LOCKED, [1000, 2000, 4000]),
        (BUSY, [200, 400, 800, 1600]),
        ("MODEL_TIMEOUT", [200, 400, 800]),
        ("MODEL_PROVIDER_ERROR", [200, 400, 800]),
        ("MODEL_INVALID_RESPONSE", [200, 400, 800]),
        ("KERNEL_DISPATCH_TIMEOUT", [200, 400, 800]),
        ("MODEL_QUOTA_EXCEEDED", [1000, 2000]),
        ("RATE_LIMIT_EXCEEDED", [1000, 2000]),
    ],
)
def test_each_wait_is_twice_the_one_before_with_some_jitter_until_it_is_enough(code, waits):
    for attempt, least in enumerate(waits, start=1):
        for _ in range(50):
            decided = classify(code, attempt)
            assert decided.retry
            assert least <= decided.backoff_ms <= least * 1.25
    final = classify(code, len(waits) + 1)
    assert (final.retry, final.reason) == (False, "max_attempts_exhausted")


def test_waits_differ_so_that_many_do_not_come_back_at_once():
    assert len({classify(RATE, 3).backoff_ms for _ in range(50)}) > 1


@pytest.mark.parametrize(
    "code", [reason.value for reason in Reason if reason.value not in (RATE, LOCKED, BUSY)] + ["no code of ours", ""]
)
def test_every_other_refusal_is_final(code):
    decided = classify(code, 1)
    assert (decided.retry, decided.backoff_ms, decided.reason) == (False, 0, "unknown_code")


def test_a_stated_wait_is_the_least_that_is_waited():
    assert classify(RATE, 1, retry_after_ms=90_000).backoff_ms == 90_000
    assert classify(RATE, 1, retry_after_ms=1).backoff_ms >= 1000
    assert pause_seconds(RATE, 1, retry_after_ms=90_000) == 90
    assert 4 <= pause_seconds(RATE, 99) <= 5, "the last one holds from there on"


@pytest.mark.parametrize("attempt", [0, -1])
def test_attempts_count_from_one(attempt):
    with pytest.raises(ValueError, match="counts from 1"):
        classify(TRANSIENT, attempt)


async def test_busy_storage_is_asked_again_so_often_and_nothing_else_is(monkeypatch):
    monkeypatch.setattr("plm_engine_core.agent_runtime.retry._jittered", lambda _: 0)
    asked = []

    async def act():
        asked.append(1)
        if len(asked) < answers_at:
            raise error
        return "done"

    answers_at, error = 5, StorageUnavailable("busy")
    assert await patiently(act) == "done"
    asked, answers_at = [], 6
    with pytest.raises(StorageUnavailable):
        await patiently(act)
    assert len(asked) == 5
    asked, error = [], Conflict("no", reason="x")
    with pytest.raises(Conflict):
        await patiently(act)
    assert len(asked) == 1
