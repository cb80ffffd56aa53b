"""What is counted at the door, through the OpenTelemetry API; without an SDK in the process it goes nowhere."""

from __future__ import annotations

from opentelemetry import metrics

from plm_engine_core.control_plane.identity.context import IdentityContext
from plm_engine_core.control_plane.identity.errors import (
    IdentityMalformedError,
    IdentityMissingError,
    IdentityValidationError,
    RejectReason,
)

_OUTCOMES = {
    RejectReason.MISSING: "missing",
    RejectReason.EXPIRED: "expired",
    RejectReason.BAD_SIGNATURE: "bad_signature",
    RejectReason.UNKNOWN_KEY: "bad_signature",
}


class IdentityMetrics:
    """The counter ``identity_bind_total`` and the histogram ``identity_validation_latency_seconds``.

    The counter has the attributes `provider`, `actor_kind` (``unknown`` when nobody was let in) and `outcome`:
    ``success``, ``missing``, ``expired``, ``bad_signature``, ``malformed`` or ``other``; the histogram has `provider`.
    """

    def __init__(self, provider: str, *, meter: metrics.Meter | None = None) -> None:
        meter = meter or metrics.get_meter("plm_engine_core.identity")
        self._provider = provider
        self._binds = meter.create_counter("identity_bind_total", description="Attempts to establish an identity")
        self._latency = meter.create_histogram(
            "identity_validation_latency_seconds", unit="s", description="Time to validate a token, keys included"
        )

    def validated(self, seconds: float) -> None:
        """A token was looked at, whatever came of it."""
        self._latency.record(seconds, {"provider": self._provider})

    def bound(self, identity: IdentityContext) -> None:
        """Somebody was let in."""
        self._count("success", identity.actor_kind.value)

    def refused(self, error: IdentityValidationError | None) -> None:
        """Nobody was let in; without an error, because the issuer or the audit log was not there."""
        outcome = "other"
        if error is not None:
            outcome = _OUTCOMES.get(error.reason, "malformed" if isinstance(error, _FORM) else "other")
        self._count(outcome, "unknown")

    def _count(self, outcome: str, actor_kind: str) -> None:
        self._binds.add(1, {"provider": self._provider, "actor_kind": actor_kind, "outcome": outcome})


_FORM = (IdentityMalformedError, IdentityMissingError)
