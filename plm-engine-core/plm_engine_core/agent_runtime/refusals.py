"""How a governed function refuses to be called.

ControlPlaneError
└── CallRefused           the function did not run; `reason` and `unblock` say why and what would help
    ├── CallDenied        not like this: `limit`, `lock` and `retry_after_ms` where they apply
    ├── CallSteered       propose something else: `guidance` says what
    └── CallPending       a human is asked; `resume()` after they approved

The function did run, and nobody is told what it gave back:

ControlPlaneError
└── OutputWithheld        an evaluator did not let it be kept; `reason` says why. Do not call it again for that
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.withheld import Withheld
from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.runs import Run
from plm_engine_core.control_plane.vocabulary import OutcomeStatus, Reason


class CallRefused(ControlPlaneError):
    """The control plane did not let a call through; nothing of it happened.

    `run_id` names the run that records it. `unblock` says what would let the call pass, where that is known.
    """

    code = "call_refused"

    def __init__(self, message: str, *, run_id: UUID, reason: Reason, unblock: str = "") -> None:
        super().__init__(f"{message}; to unblock: {unblock}" if unblock else message)
        self.run_id = run_id
        self.reason = reason
        self.unblock = unblock


class OutputWithheld(ControlPlaneError):
    """A call was made, and what it gave back was withheld: it is in no record, and its caller is not told it.

    `status` says how the call ended, `evaluator` who did not allow its output; that is empty where the policy could not
    be loaded. `reason` is `evaluator_denied`, `evaluator_failed` or `policy_missing`. `digest` is that of what was
    withheld, empty where that was no JSON. `run_id` names the run that records it.
    """

    code = "output_withheld"

    def __init__(self, withheld: Withheld, *, run_id: UUID, status: OutcomeStatus) -> None:
        super().__init__(f"{withheld.message}; the call was made ({status.value}), so do not make it again for that")
        self.run_id = run_id
        self.status = status
        self.evaluator = withheld.evaluator
        self.reason = withheld.reason
        self.digest = withheld.digest


class CallDenied(CallRefused):
    """Refused. `limit` names the budget that was too small, if one was, and `lock` the call that holds the resource.

    `retry_after_ms` is 0 where waiting is vain.
    """

    code = "call_denied"

    def __init__(
        self,
        message: str,
        *,
        run_id: UUID,
        reason: Reason,
        unblock: str = "",
        retry_after_ms: int = 0,
        limit: Mapping[str, Any] | None = None,
        lock: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, run_id=run_id, reason=reason, unblock=unblock)
        self.retry_after_ms = retry_after_ms
        self.limit = limit or {}
        self.lock = lock or {}


class CallSteered(CallRefused):
    """Refused with guidance on what to call instead."""

    code = "call_steered"

    def __init__(self, message: str, *, run_id: UUID, guidance: str) -> None:
        super().__init__(message, run_id=run_id, reason=Reason.STEERED, unblock=guidance)
        self.guidance = guidance


class CallPending(CallRefused):
    """A human has to decide the ticket before `deadline`; nothing is reserved or held meanwhile."""

    code = "call_pending"

    def __init__(self, message: str, *, run: Run, ticket_id: UUID, deadline: datetime, unblock: str) -> None:
        super().__init__(message, run_id=run.id, reason=Reason.APPROVAL_REQUIRED, unblock=unblock)
        self.run = run
        self.ticket_id = ticket_id
        self.deadline = deadline
        self._resume: Callable[[CallPending], Any] | None = None

    def resume(self) -> Any:
        """Make the call that was asked for: its result, or for an asynchronous function an awaitable of it.

        Raises:
            CallPending: nobody has decided yet. CallDenied: it was denied, its time is over, or it was made already.
        """
        if self._resume is None:
            raise TypeError("only a governed function's own CallPending can be resumed")
        return self._resume(self)


def resumable(pending: CallPending, resume: Callable[[CallPending], Any]) -> CallPending:
    """The same, with what resumes it."""
    pending._resume = resume  # noqa: SLF001  # only a governed function can say how it is called
    return pending
