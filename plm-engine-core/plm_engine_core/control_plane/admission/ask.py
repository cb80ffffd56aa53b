"""An ask: what an agent says in place of a proposal when it needs a value that only a human can give.

It is a booking of its own: no rate, tier, condition or budget has a part in it, and its answer allows nothing. Whether
an agent may ask at all, and who answers, `approval.input` of the policy says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_shared.ledger import uuid_text

from plm_engine_core.control_plane.admission.admit import AGAIN_MS, Denied, Pending, policy_changed
from plm_engine_core.control_plane.admission.proposal import Principal, check_place, check_principal, content_hash
from plm_engine_core.control_plane.errors import InvalidRequest, StorageUnavailable
from plm_engine_core.control_plane.hitl.inputs import check_ask
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.registry import AgentRegistry
from plm_engine_core.control_plane.storage.ports import AskCommand, Storage
from plm_engine_core.control_plane.texts import LONGEST_NAME, check_text
from plm_engine_core.control_plane.vocabulary import ActionTier, Reason, RiskLevel

_RULE = "approval.input"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What would end a run: the attempt that came to nothing, why, and the words in which the run would say so."""

    step: int
    attempt: int
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class InputRequest:
    """One question of an agent to humans, at a place of its run: in words, with the JSON Schema of the wanted answer.

    An empty schema takes any JSON value. Question and schema are the agent's words, and shown to people as such. Where
    the run would fail otherwise, whoever drives it says with `escalates` what would end it; no agent can.

    Raises:
        InvalidRequest: the step or the attempt has a number that none can have, or a member is of another type.
    """

    tenant_id: UUID
    run_id: UUID
    fencing_token: int
    step_index: int
    attempt: int
    step_id: str
    question: str
    principal: Principal
    schema: Mapping[str, Any] = field(default_factory=dict)
    agent: str = ""
    escalates: Failure | None = None

    def __post_init__(self) -> None:
        check_place(self.step_index, self.attempt)
        check_principal(self.principal, field="principal")
        for name in ("tenant_id", "run_id"):
            if not isinstance(getattr(self, name), UUID):
                raise InvalidRequest(f"'{name}' must be a UUID, not {getattr(self, name)!r:.80}", field=name)
        if not isinstance(self.agent, str):
            raise InvalidRequest(f"'agent' must be a text, not {self.agent!r:.80}", field="agent")
        if self.escalates is not None and not isinstance(self.escalates, Failure):
            raise InvalidRequest(f"'escalates' must be a Failure, not {self.escalates!r:.80}", field="escalates")

    @property
    def step_key(self) -> str:
        """Names the step, as that of a proposal does."""
        return f"{uuid_text(self.run_id)}/{self.step_index}"


async def ask(
    request: InputRequest, *, policy: PolicySnapshot, storage: Storage, agents: AgentRegistry | None = None
) -> Pending | Denied:
    """Park the run on a ticket that asks for an input, or refuse the step; the same ask again answers the same.

    Refused is an agent that the policy lets ask nothing, or no more in this run (`input_not_allowed`), one that is not
    active, and one whose delegation is over. Under a halt (`halted`), while the run is being cancelled
    (`cancel_requested`), and where the policy was changed meanwhile (`policy_changed`) nothing is booked.

    Raises:
        InvalidRequest: question or schema cannot be put before a human; names the field.
        FencingLost: the caller no longer holds the run; it must stop.
        IdempotencyConflict: this attempt was already used for something else.
    """
    check_text(request.step_id, field="step_id", longest=LONGEST_NAME)
    asked = check_ask(request.question, request.schema)
    demand = policy.approval.input_demand()
    refusal = await _refusal(request, policy, storage, agents)
    allowed = policy.approval.input
    escalated = {"escalates": asdict(request.escalates)} if request.escalates is not None else {}
    command = AskCommand(
        tenant_id=request.tenant_id,
        run_id=request.run_id,
        fencing_token=request.fencing_token,
        step_index=request.step_index,
        attempt=request.attempt,
        step_id=request.step_id,
        step_key=request.step_key,
        resource=request.step_id,
        arguments=asked,
        digest=content_hash({"ask": asked}),
        policy_digest=policy.digest,
        requester=request.principal.user_id,
        actor=request.principal.actor,
        decision=escalated
        | (
            refusal
            or _said("ask", Reason.INPUT_REQUIRED, asked["question"], _unblock(demand.scopes, demand.timeout_seconds))
        ),
        beyond=escalated
        | _not_allowed(f"the policy lets a run ask {allowed.max_per_run} times" if allowed else "", ".max_per_run"),
        most=allowed.max_per_run if allowed else 0,
        ticket_id=new_id(),
        ticket_seconds=demand.timeout_seconds,
        escalate_seconds=policy.approval.escalate_seconds,
    )
    try:
        answer = await storage.approvals.ask(command)
    except StorageUnavailable as error:  # nothing was booked, or the reply was lost; asking again is safe
        return Denied(
            reason=Reason.STORAGE_BUSY,
            message=str(error),
            rule="storage",
            unblock="asking again, once the database answers",
            retry_after_ms=AGAIN_MS,
        )
    return _answered(answer)


async def _refusal(
    request: InputRequest, policy: PolicySnapshot, storage: Storage, agents: AgentRegistry | None
) -> dict[str, Any] | None:
    """Why this agent may ask nothing now."""
    if policy.approval.input is None:
        return _not_allowed("the policy lets no agent ask humans for an input")
    if request.escalates is not None and not policy.approval.asks_on_failure:
        return _not_allowed("the policy has runs fail without asking humans first", ".failures")
    agent = agents.get(request.agent) if agents is not None else None
    if agents is not None and (agent is None or agent.inactive):
        problem = (
            agent.inactive if agent is not None else f"agent {request.agent or 'without a name'} is not registered"
        )
        return _said("deny", Reason.AGENT_INACTIVE, problem, "an active registration of the agent", rule="agents")
    until = request.principal.expires_at
    if until is not None and until <= await storage.runs.now():
        ended = f"the delegation ended at {until.isoformat()}"
        return _said("deny", Reason.DELEGATION_EXPIRED, ended, "a new delegation, and a new run", rule="delegation")
    return None


def _not_allowed(message: str, place: str = "") -> dict[str, Any]:
    return _said("deny", Reason.INPUT_NOT_ALLOWED, message, f"another {_RULE}{place} in the policy", rule=_RULE + place)


def _said(outcome: str, reason: Reason, message: str, unblock: str, *, rule: str = _RULE) -> dict[str, Any]:
    """A decision as it is recorded; a ticket has a tier and a risk, and those of an ask are the least."""
    return {
        "outcome": outcome,
        "reason": reason.value,
        "message": message,
        "rule": rule,
        "unblock": unblock,
        "stages": [{"stage": "approval", "passed": False, "detail": message}],
        "tier": ActionTier.ALWAYS_APPROVE.value,
        "risk": RiskLevel.LOW.value,
    }


def _unblock(scopes: tuple[str, ...], seconds: float) -> str:
    return f"an input by a person with {' and '.join(scopes)} within {seconds:g} s"


def _answered(answer: Mapping[str, Any]) -> Pending | Denied:
    if answer["status"] == "policy_changed":
        return policy_changed(answer)
    reason, message, rule, unblock = (str(answer[name]) for name in ("reason", "message", "rule", "unblock"))
    if answer["status"] == "pending":
        return Pending(
            ticket_id=UUID(answer["ticket_id"]),
            deadline=datetime.fromisoformat(answer["deadline"]),
            reason=Reason(reason),
            message=message,
            rule=rule,
            unblock=unblock,
        )
    return Denied(reason=Reason(reason), message=message, rule=rule, unblock=unblock)
