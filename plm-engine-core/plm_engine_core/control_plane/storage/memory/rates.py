"""Rate buckets, as `engine_prepare` books them: a token of every bucket, or of none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from uuid import UUID

from plm_engine_core.control_plane.limits import Bucket, Dimension, RateReading
from plm_engine_core.control_plane.storage.memory.books import Books, Row


def take_tokens(books: Books, tenant_id: UUID, run_id: UUID, run: Row | None, buckets: Sequence[Bucket]) -> RateReading:
    """Take one token of every bucket, or say which was empty and when all will have one."""
    taken, longest, empty = [], 0, None
    for bucket in buckets:
        name = _name(bucket, run_id, run)
        wait = _take(books, tenant_id, name, bucket)
        if not wait:
            taken.append(name)
        elif wait > longest:
            longest, empty = wait, bucket.dimension
    if longest:
        for name in taken:
            row = books.rate_buckets.get(tenant_id, name) or {"tokens": 0.0}
            books.rate_buckets.change(tenant_id, name, tokens=row["tokens"] + 1)
    return RateReading(allowed=not longest, retry_after_ms=longest, dimension=empty)


def _name(bucket: Bucket, run_id: UUID, run: Row | None) -> str:
    if bucket.dimension is not Dimension.AGENT:
        return bucket.dimension.value
    return f"agent/{run['agent_id']}" if run is not None and run["agent_id"] else f"run/{run_id}"


def _take(books: Books, tenant_id: UUID, name: str, bucket: Bucket) -> int:
    """0, or in how many milliseconds there will be a token; a clock that steps back refills nothing.

    Who is refused brings a time that lies ahead back to now, so that the bucket fills again from then on.
    """
    books.require_tenant(tenant_id)
    now = books.now()
    row = books.rate_buckets.get(tenant_id, name) or {"tokens": bucket.burst, "updated_at": now}
    passed = max(0.0, (now - row["updated_at"]).total_seconds())
    left = min(bucket.burst, row["tokens"] + bucket.per_second * passed) - 1
    updated_at = max(now, row["updated_at"]) if left >= 0 else now
    books.rate_buckets.put(tenant_id, name, {"tokens": left if left >= 0 else left + 1, "updated_at": updated_at})
    return 0 if left >= 0 else max(1, math.ceil(-left / bucket.per_second * 1000))
