"""Commands as JSON: what the booking functions of every storage read."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from plm_shared.ledger import uuid_text

from plm_engine_core.control_plane.admission.proposal import content_hash
from plm_engine_core.control_plane.errors import FencingLost
from plm_engine_core.control_plane.policy.gates import GateRefusal
from plm_engine_core.control_plane.runs.run import NewRun
from plm_engine_core.control_plane.storage.ports import (
    AdmitCommand,
    AskCommand,
    InputCommand,
    SettleCommand,
    VoteCommand,
)
from plm_engine_core.control_plane.vocabulary import PROVIDE_INPUT, ExecutorKind

_LAST_TOKEN = 2**63 - 1


def held_token(run_id: UUID, token: object) -> int:
    """A token that a holder may have. In SQL none at all is unlike no other, and would pass for everybody's.

    Raises:
        FencingLost: nobody can have it.
    """
    if type(token) is not int or not 0 < token <= _LAST_TOKEN:
        raise FencingLost(f"the lease of run {run_id} is no longer held with fencing token {token!r}")
    return token


def admit_json(command: AdmitCommand) -> dict[str, Any]:
    """What is booked for one decision."""
    lock = {"lock": command.lock.value} if command.lock is not None else {}
    return {
        "tenant_id": uuid_text(command.tenant_id),
        "run_id": uuid_text(command.run_id),
        "fencing_token": held_token(command.run_id, command.fencing_token),
        "command_id": command.command_id,
        "command_digest": command.command_digest,
        "step_index": command.step_index,
        "attempt": command.attempt,
        "step_id": command.step_id,
        "step_key": command.step_key,
        "capability": command.capability,
        "resource": command.resource,
        "arguments": dict(command.arguments),
        "digest": command.digest,
        "policy_digest": command.policy_digest,
        "executor_kind": command.executor_kind.value,
        "requester": uuid_text(command.requester),
        "actor": command.actor,
        "decision": dict(command.decision),
        "ticket_id": str(command.ticket_id) if command.ticket_id else None,
        "ticket": {
            "id": str(command.new_ticket_id),
            "seconds": command.ticket_seconds,
            "escalate_seconds": command.escalate_seconds,
        },
        "grant": {"id": str(command.grant_id), "seconds": command.grant_seconds, "span_id": command.span_id},
        "begin": command.begin,
        "reserve": [each.stored for each in command.reserve],
        **lock,
    }


def settle_json(command: SettleCommand) -> dict[str, Any]:
    """What is booked for one outcome; its ledger rows travel beside it."""
    return {
        "tenant_id": uuid_text(command.tenant_id),
        "run_id": uuid_text(command.run_id),
        "step_index": command.step_index,
        "attempt": command.attempt,
        "grant_id": str(command.grant_id),
        "fencing_token": held_token(command.run_id, command.fencing_token),
        "status": str(command.status),
        "outcome_digest": command.outcome_digest,
        "evidence": str(command.evidence),
        "output": command.output,
        "error": command.error,
        "usage": dict(command.usage),
        "charges": dict(command.charges),
        "artifacts": list(command.artifacts),
        "trace_id": command.trace_id,
        "actor": command.actor,
    }


def creation_json(new: NewRun) -> dict[str, Any]:
    """What the event of a run's creation says; its input stands in the run."""
    told: dict[str, Any] = {
        "agent": {key: value for key, value in new.agent.items() if key != "plan"},
        "policy_digest": new.policy_digest,
        "trace_id": new.trace_id,
        "budget": {str(unit): str(amount) for unit, amount in new.budget.items()},
    }
    return {**told, "evaluations": list(new.evaluations)} if new.evaluations else told


def refusal_json(new: NewRun, refusal: GateRefusal) -> dict[str, Any]:
    """What the event says of a run that was not created: of its input, only the digest."""
    return {
        "agent": {key: value for key, value in new.agent.items() if key != "plan"},
        "policy_digest": new.policy_digest,
        "trace_id": new.trace_id,
        "input_digest": content_hash(dict(new.input)),
        "reason": refusal.reason.value,
        "evaluator": refusal.evaluation.name,
        "rule": refusal.rule,
        "message": refusal.message,
        "evaluations": list(new.evaluations),
    }


def vote_json(command: VoteCommand) -> dict[str, Any]:
    """What is booked for one vote."""
    scope = command.scope
    return {
        "tenant_id": str(command.tenant_id),
        "ticket_id": str(command.ticket_id),
        "vote": command.vote.value,
        "voter": str(command.voter),
        "actor": command.actor,
        "comment": command.comment,
        "quorum": command.quorum,
        "authority": list(command.authority),
        "escalated": command.escalated,
        "scope": scope and {"uses": scope.uses, "seconds": scope.seconds, "any_resource": scope.any_resource},
        "scope_id": str(command.scope_id),
        "requester_may": command.requester_may,
        **_as_read(command),
    }


def _as_read(command: VoteCommand | InputCommand) -> dict[str, Any]:
    return {} if command.as_read is None else {"as_read": command.as_read}


def ask_json(command: AskCommand) -> dict[str, Any]:
    """What is booked for one ask."""
    return {
        "tenant_id": uuid_text(command.tenant_id),
        "run_id": uuid_text(command.run_id),
        "fencing_token": held_token(command.run_id, command.fencing_token),
        "step_index": command.step_index,
        "attempt": command.attempt,
        "step_id": command.step_id,
        "step_key": command.step_key,
        "capability": PROVIDE_INPUT,
        "resource": command.resource,
        "arguments": dict(command.arguments),
        "digest": command.digest,
        "policy_digest": command.policy_digest,
        "executor_kind": ExecutorKind.EXTERNAL.value,
        "requester": uuid_text(command.requester),
        "actor": command.actor,
        "decision": dict(command.decision),
        "beyond": dict(command.beyond),
        "most": command.most,
        "ticket": {
            "id": str(command.ticket_id),
            "seconds": command.ticket_seconds,
            "escalate_seconds": command.escalate_seconds,
        },
    }


def input_json(command: InputCommand) -> dict[str, Any]:
    """What is booked for one input."""
    return {
        "tenant_id": str(command.tenant_id),
        "ticket_id": str(command.ticket_id),
        "vote": PROVIDE_INPUT,
        "input": command.input,
        "voter": str(command.voter),
        "actor": command.actor,
        "comment": command.comment,
        "authority": list(command.authority),
        "escalated": command.escalated,
        "requester_may": command.requester_may,
        **_as_read(command),
    }
