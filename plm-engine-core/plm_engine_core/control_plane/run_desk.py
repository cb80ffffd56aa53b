"""How runs come to be: as what their principal may do, within the policy's limits, on an input that is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from plm_engine_core.control_plane.admission.evaluators.values import apart
from plm_engine_core.control_plane.admission.phases import examine_input
from plm_engine_core.control_plane.admission.proposal import Principal, check_principal
from plm_engine_core.control_plane.errors import Forbidden, InputRefused, InvalidRequest
from plm_engine_core.control_plane.in_force import Deciding, PolicyInForce
from plm_engine_core.control_plane.limits import Subjects
from plm_engine_core.control_plane.limits.desk import check_amount
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.registry import AgentDescriptor, AgentRegistry, Delegation, narrowed, share_of
from plm_engine_core.control_plane.runs.request import RunRequest
from plm_engine_core.control_plane.runs.run import NewRun, Run
from plm_engine_core.control_plane.storage.ports import RunStore
from plm_engine_core.control_plane.texts import LONGEST_KEY, LONGEST_NAME, check_text
from plm_engine_core.control_plane.vocabulary import BudgetScope

_TRACE_ID = re.compile("[0-9a-f]{32}")
_SPAN_ID = re.compile("[0-9a-f]{16}")

_DELEGATIONS = 4
"""How many hands work may pass through where no agent is registered."""

CREATE_SCOPE = "plm.runs.create"
OVERRIDE_SCOPE = "plm.cost.override"


class RunDesk:
    """Where runs are created, by people and by runs that hand work on."""

    def __init__(self, store: RunStore, *, in_force: PolicyInForce, agents: AgentRegistry | None) -> None:
        self._store = store
        self._in_force = in_force
        self._agents = agents

    async def create(self, request: RunRequest, *, principal: Principal) -> tuple[Run, bool]:
        """Create a run that acts as `principal` and let some run worker drive it; the flag says it existed already.

        The evaluators of the policy's phase `input` are asked first about what it would be given, also where that is
        nothing. What they did not allow creates nothing, and stands in the tenant's stream as `run_refused`.

        Raises:
            InputRefused: an evaluator denies it, raised, was too late or answered nonsense.
            InvalidRequest: a value of the request cannot be used; names the field.
            Forbidden: the principal lacks `plm.runs.create`, raises a limit without `plm.cost.override`, or its
                delegation has ended; or agents are registered and this one is not, or is not active.
            IdempotencyConflict: the key was used for another request.
            NotFound: the tenant does not exist.
            PolicyMissing: the activated policy cannot be loaded by this process.
        """
        check_principal(principal, field="principal")
        if CREATE_SCOPE not in principal.scopes:
            raise Forbidden(
                f"creating runs needs the OAuth scope {CREATE_SCOPE}",
                reason="missing_scopes",
                missing_scopes=(CREATE_SCOPE,),
            )
        for name, pattern in (("trace_id", _TRACE_ID), ("root_span_id", _SPAN_ID)):
            if not pattern.fullmatch(str(getattr(request, name))):
                raise InvalidRequest(f"{name} {getattr(request, name)!r} is no W3C trace context id", field=name)
        for name in ("agent", "input"):
            if not isinstance(getattr(request, name), Mapping):
                raise InvalidRequest(f"{name} must be a mapping, not {getattr(request, name)!r:.80}", field=name)
        if agent_id := _agent_id(request.agent):
            check_text(agent_id, field="agent.name", longest=LONGEST_NAME)
        if request.idempotency_key is not None:
            check_text(request.idempotency_key, field="idempotency_key", longest=LONGEST_KEY)
        if principal.expires_at is not None and principal.expires_at.tzinfo is None:
            raise InvalidRequest("the end of a delegation needs a time zone", field="principal.expires_at")
        agent = self._active_agent(request)
        if principal.expires_at is not None and principal.expires_at <= await self._store.now():
            raise Forbidden(f"the delegation ended at {principal.expires_at.isoformat()}", reason="delegation_expired")
        deciding = self._in_force.now
        policy = deciding.policy
        limits = _limits(policy, request.budget, principal)
        new = NewRun(
            tenant_id=request.tenant_id,
            run_id=request.run_id,
            kind=request.kind,
            agent=request.agent,
            input=request.input,
            principal=principal,
            policy_digest=policy.digest,
            trace_id=request.trace_id,
            root_span_id=request.root_span_id,
            budget=agent.within(limits) if agent is not None else limits,
            tenant_budget=policy.budgets.tenant,
            subjects=Subjects(
                agent_id=_agent_id(request.agent) or None,
                run_group_id=request.run_group_id,
                user_id=principal.user_id,
                team=policy.team_of(principal.user_id),
            ),
            artifacts=request.artifacts,
            idempotency_key=request.idempotency_key,
            request_digest=request.request_digest,
        )
        if policy.plans.input_gates:
            return await self._create_as_allowed(new, deciding)
        return await self._store.create(new)

    async def _create_as_allowed(self, new: NewRun, deciding: Deciding) -> tuple[Run, bool]:
        """Create a run where its input is allowed. The same request again answers the run it made, come what may."""
        new = replace(new, input=apart(new.input, root="input"))  # what is asked about is what the run gets
        found = await examine_input(
            deciding.policy,
            deciding.evaluators,
            agent=_agent_id(new.agent),
            given=new.input,
            principal=new.principal,
        )
        new = replace(new, evaluations=[each.to_json() for each in found.evaluations])
        if found.refusal is None:
            return await self._store.create(new)
        earlier = await self._store.refuse(new, found.refusal)
        if earlier is not None:
            return earlier, True
        raise InputRefused(
            f"no run is created: {found.refusal.message}",
            reason=found.refusal.reason.value,
            evaluator=found.refusal.evaluation.name,
            rule=found.refusal.rule,
            unblock=found.refusal.unblock,
        )

    async def delegate(self, parent: Run, delegation: Delegation, request: RunRequest) -> tuple[Run, bool]:
        """Create a run that acts for the principal of `parent`, with no more than `delegation` hands on.

        It spends at most its share of what `parent` had left. What several such runs spend together is bounded by a
        budget of their run group.

        Raises:
            Forbidden: the delegation is wider than its delegator in any way, or the delegator's agent may not delegate;
                or what `create` refuses.
            InvalidRequest: the share or the end of the delegation cannot be used; or what `create` refuses.
        """
        agent = self._registered(_agent_id(parent.agent))
        depth = agent.delegations if agent is not None else _DELEGATIONS
        principal = narrowed(parent.principal, delegation, depth=depth, now=await self._store.now())
        budgets = await self._store.budgets(parent.tenant_id, parent.id)
        left = {each.unit: each.limit - each.spent - each.reserved for each in budgets if each.scope is BudgetScope.RUN}
        share = share_of(left, delegation)
        for unit, asked in request.budget.items():
            if unit not in share:
                known = " or ".join(repr(str(each)) for each in share)
                raise InvalidRequest(f"the delegator has a budget in {known}, not {unit!r}", field=f"budget.{unit}")
            check_amount(asked, field=f"budget.{unit}")
        budget = {unit: min(request.budget.get(unit, amount), amount) for unit, amount in share.items()}
        return await self.create(replace(request, budget=budget), principal=principal)

    def _active_agent(self, request: RunRequest) -> AgentDescriptor | None:
        """The registration of a run's agent, where agents are registered."""
        agent = self._registered(_agent_id(request.agent))
        if agent is not None and agent.inactive:
            raise Forbidden(agent.inactive, reason="agent_inactive")
        return agent

    def _registered(self, agent_id: str) -> AgentDescriptor | None:
        if self._agents is None:
            return None
        agent = self._agents.get(agent_id)
        if agent is None:
            raise Forbidden(
                f"agent {agent_id or 'without a name'} is not registered; ask the operator to register it",
                reason="agent_inactive",
            )
        return agent


def _agent_id(agent: Mapping[str, Any]) -> str:
    return str(agent.get("name") or "")


def _limits(policy: PolicySnapshot, asked: Mapping[str, Decimal], principal: Principal) -> dict[str, Decimal]:
    limits = dict(policy.budgets.run)
    for unit, amount in asked.items():
        if unit not in limits:
            known = " or ".join(repr(str(each)) for each in limits)
            raise InvalidRequest(f"a run has a budget in {known}, not {unit!r}", field=f"budget.{unit}")
        check_amount(amount, field=f"budget.{unit}")
        if amount > limits[unit] and OVERRIDE_SCOPE not in principal.scopes:
            raise Forbidden(
                f"the policy allows {limits[unit]} {unit} a run; more needs the OAuth scope {OVERRIDE_SCOPE}",
                reason="missing_scopes",
                missing_scopes=(OVERRIDE_SCOPE,),
            )
        limits[unit] = amount
    return limits
