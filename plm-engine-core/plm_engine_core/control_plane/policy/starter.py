"""A policy to start with, and policies as programs write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot, load_policy

STARTER_POLICY: Mapping[str, Any] = {
    "version": "starter",
    "tier_by_mode": {"read": "auto_approve", "plan-write": "auto_approve", "execute-write": "always_approve"},
    "risk_by_mode": {"read": "low", "plan-write": "low", "execute-write": "high"},
    "autonomy_ceiling": "L3",
    "rate_limit": {"per_second": 1000, "burst": 1000},
    "budgets": {"run": {"EUR": "10", "calls": "10"}, "tenant": {"EUR": "1000", "calls": "100000"}},
}
"""Reads run, a human approves every write, and nothing costs more than it should."""


def policy_of(written: PolicySnapshot | Mapping[str, Any] | str | Path | None) -> PolicySnapshot:
    """A policy from a file's path, or from members that take the place of those in `STARTER_POLICY`.

    Raises:
        InvalidRequest: it is no policy; names the entry.
    """
    if isinstance(written, PolicySnapshot):
        return written
    if isinstance(written, str | Path):
        return load_policy(Path(written))
    try:
        return PolicySnapshot.model_validate({**STARTER_POLICY, **(written or {})})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "policy"
        raise InvalidRequest(
            f"the policy is refused: {where}: {first['msg']}; correct it there", field=where
        ) from error
