"""Errors of the control plane; a class says what the caller can do, its fields say about what.

    ControlPlaneError
    ├── InvalidRequest        change the request: `field` is wrong
    ├── NotFound              nothing of that id in this tenant
    ├── Forbidden             the caller lacks a scope or may not decide this
    │   └── InputRefused          an evaluator does not let a run be given this: `evaluator`, `rule`, `unblock`
    ├── Conflict              the state does not allow it (any more): read it again
    │   ├── IdempotencyConflict   the same key was used for other content
    │   ├── EventsPruned          events that would tell it are gone: ask the archive
    │   └── FeedPruned            events this reader has not seen are gone: go on with `cursor`
    ├── FencingLost           another run worker took the run over: drop everything
    └── StorageUnavailable    send the same again: whatever was booked already is not booked twice
        └── PolicyMissing         nothing can be decided here; another process may

A refused *proposal* is not an error: it is an answer of admission with a reason.
"""

from __future__ import annotations


class ControlPlaneError(Exception):
    """Base of everything the control plane raises on purpose."""

    code = "control_plane_error"


class InvalidRequest(ControlPlaneError):
    """The request cannot be carried out as written."""

    code = "invalid_request"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NotFound(ControlPlaneError):
    """Nothing with this id exists in the caller's tenant."""

    code = "not_found"

    def __init__(self, kind: str, identifier: object) -> None:
        super().__init__(f"{kind} {identifier} does not exist")
        self.kind = kind
        self.identifier = str(identifier)


class Forbidden(ControlPlaneError):
    """The caller is known and may not do this."""

    code = "forbidden"

    def __init__(self, message: str, *, reason: str, missing_scopes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.missing_scopes = missing_scopes


class InputRefused(Forbidden):
    """No run was created, as an evaluator did not allow what it would have been given; the refusal is on record.

    `reason` is `evaluator_denied`, or `evaluator_failed` where it gave no answer; `rule` is its place in the policy.
    """

    code = "input_refused"

    def __init__(self, message: str, *, reason: str, evaluator: str, rule: str, unblock: str) -> None:
        super().__init__(message, reason=reason)
        self.evaluator = evaluator
        self.rule = rule
        self.unblock = unblock


class Conflict(ControlPlaneError):
    """The present state does not allow this; `reason` is machine-readable."""

    code = "conflict"

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class IdempotencyConflict(Conflict):
    """The same idempotency key was used before, for other content."""

    code = "idempotency_conflict"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="idempotency_conflict")


class EventsPruned(Conflict):
    """The past cannot be told from the events: those of `stream` before sequence `before` were pruned, None means all.

    They are in the archive, if one is kept.
    """

    code = "events_pruned"

    def __init__(self, *, stream: str, before: int | None) -> None:
        gone = "all events" if before is None else f"the events before {before}"
        super().__init__(
            f"{gone} of the stream {stream} were pruned, and without them nobody can say how it was then; they are in "
            "the archive, if one is kept",
            reason="events_pruned",
        )
        self.stream = stream
        self.before = before


class FeedPruned(Conflict):
    """Events that a reader of the feed has not seen were pruned; with `cursor` it goes on, missing no others."""

    code = "feed_pruned"

    def __init__(self, *, streams: int, cursor: str) -> None:
        super().__init__(
            f"events of {streams} streams were pruned before this reader saw them; they are in the archive, if one is "
            f"kept, and what was not pruned goes on after the cursor {cursor}",
            reason="feed_pruned",
        )
        self.streams = streams
        self.cursor = cursor


class FencingLost(ControlPlaneError):
    """The caller no longer holds the lease it writes under; nothing was written."""

    code = "fencing_lost"


class StorageUnavailable(ControlPlaneError):
    """The database was too busy, or could not be reached; a lost reply leaves open whether anything was changed."""

    code = "storage_unavailable"


class PolicyMissing(StorageUnavailable):
    """The policy that is in force cannot be loaded by this process, and nothing is decided without one."""

    code = "policy_missing"
