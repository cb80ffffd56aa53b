"""The words everything speaks: tiers, levels, states and reasons, as enums whose values are stored and shown."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class ActionTier(StrEnum):
    """How a policy treats a capability, from the strictest to the most permissive."""

    BLOCKED = "blocked"  # never runs
    ALWAYS_APPROVE = "always_approve"  # a human approves every single use
    STEER = "steer"  # refused with guidance on what to do instead
    AUTO_APPROVE = "auto_approve"  # runs without a human when its risk allows, else a human approves
    UNRESTRICTED = "unrestricted"  # skips approval, never budgets, halts or the record


class RiskLevel(StrEnum):
    """Rated risk of one proposal."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"

    @property
    def rank(self) -> int:
        """Position in the total order, lowest risk first."""
        return list(RiskLevel).index(self)


class AutonomyLevel(StrEnum):
    """How far an agent may go on its own."""

    L1 = "L1"  # reads only
    L2 = "L2"  # reads and plans; writes only when certified and approved by a human
    L3 = "L3"  # everything its policy allows

    @property
    def rank(self) -> int:
        """Position in the total order, least autonomy first."""
        return list(AutonomyLevel).index(self)


class CapabilityMode(StrEnum):
    """What using a capability does to the world."""

    READ = "read"  # changes nothing
    PLAN_WRITE = "plan-write"  # prepares a change that has no effect yet
    EXECUTE_WRITE = "execute-write"  # changes something


class CapabilityStatus(StrEnum):
    """Life of one version of a capability."""

    DRAFT = "draft"  # may not be proposed yet, but by tenants that its allowed_tenants names
    ACTIVE = "active"
    DEPRECATED = "deprecated"  # may still be proposed
    RETIRED = "retired"  # may no longer be proposed


class TenantAccess(StrEnum):
    """How a capability that names tenants stands to one tenant; the refusals are called as their `Reason`."""

    ALLOWED = "allowed_tenant"  # its allowed_tenants names the tenant
    NOT_ALLOWED = "not_allowed_tenant"  # its allowed_tenants names others only
    DENIED = "denied_tenant"  # its denied_tenants names the tenant
    NOT_DENIED = "not_denied_tenant"  # its denied_tenants names others only


class LockScope(StrEnum):
    """Within what calls of a capability exclude each other on the same resource."""

    RUN = "run"
    TENANT = "tenant"


class LockHolder(StrEnum):
    """How the call stands that holds a resource."""

    ISSUED = "issued"  # its grant may begin
    BEGUN = "begun"
    UNKNOWN = "unknown"  # its outcome is unknown, and so is whether it still runs


class AgentStatus(StrEnum):
    """Life of one version of an agent."""

    ACTIVE = "active"
    SUSPENDED = "suspended"  # may propose nothing for the time being
    RETIRED = "retired"  # may propose nothing any more


class Stage(StrEnum):
    """The locked order of the stages of a decision; the first refusal ends it."""

    RATE_LIMIT = "rate_limit"
    AUTHORIZATION = "authorization"
    AUTONOMY_GATING = "autonomy_gating"
    CLASSIFY = "classify"
    COST_BUDGET = "cost_budget"


PIPELINE_ORDER: tuple[Stage, ...] = (Stage.RATE_LIMIT, Stage.AUTHORIZATION, Stage.AUTONOMY_GATING, Stage.COST_BUDGET)
"""The published order of the policy stages; classification runs between the last two."""


class RoutingResolutionStep(StrEnum):
    """What settled how a proposal is treated."""

    EXPLICIT_ASSIGNMENT = "explicit_assignment"  # blocked, or a rule of the policy
    POLICY_LIST_MATCH = "policy_list_match"  # the capability's own tier
    RISK_TIER_MATCH = "risk_tier_match"  # the tier of its mode
    CAPABILITY_MATCH = "capability_match"  # no such capability
    DEFAULT_AGENT = "default_agent"  # reserved


class EvaluationPhase(StrEnum):
    """What an evaluator is asked about."""

    INPUT = "input"  # what a run is given, before it is created
    CALL = "call"  # a proposal, before it is decided
    OUTPUT = "output"  # what a call gave back, before it is recorded


class EvaluationStatus(StrEnum):
    """How an evaluator ended; only `allowed` lets a proposal pass."""

    ALLOWED = "allowed"
    DENIED = "denied"
    FAILED = "failed"  # it raised, or is not there
    TIMED_OUT = "timed_out"
    INVALID = "invalid"  # it answered with something else than a result
    CANCELLED = "cancelled"  # another one denied first


class RunKind(StrEnum):
    """Who executes the steps of a run."""

    HOSTED = "hosted"  # our run workers
    EXTERNAL = "external"  # an agent outside, which settles with the grant's secret


class ExecutorKind(StrEnum):
    """Who carried out one step."""

    PLUGIN = "plugin"
    EXTERNAL = "external"


class Evidence(StrEnum):
    """How much is known about an outcome."""

    REPORTED = "reported"  # somebody says so
    MEASURED = "measured"  # our plugin worker returned it
    VERIFIED = "verified"  # a post-condition was checked and held


class RunState(StrEnum):
    """Where a run stands; `runs.states` holds the legal moves."""

    QUEUED = "queued"  # waits for a run worker
    RUNNING = "running"  # a run worker holds its lease
    AWAITING_APPROVAL = "awaiting_approval"  # parked as a row until somebody decides a ticket
    HALTED = "halted"  # parked as a row until the halt is lifted
    OUTCOME_UNKNOWN = "outcome_unknown"  # parked until somebody says whether an effect happened
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class StepState(StrEnum):
    """Where one attempt of a step stands."""

    DENIED = "denied"  # refused by admission
    STEERED = "steered"  # refused with guidance
    AWAITING_APPROVAL = "awaiting_approval"
    GRANTED = "granted"  # may begin once
    RUNNING = "running"  # the call left the host
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # the plugin answered with an error
    CANCELLED = "cancelled"  # the plugin acknowledged a cancel
    NOT_STARTED = "not_started"  # the call never left the host; nothing was spent
    SUPERSEDED = "superseded"  # an idempotent step whose worker was lost; the next attempt repeats it
    OUTCOME_UNKNOWN = "outcome_unknown"  # the effect may or may not have happened


class OutcomeStatus(StrEnum):
    """What an executor or a recovering driver says about one granted call."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    NOT_STARTED = "not_started"
    SUPERSEDED = "superseded"
    OUTCOME_UNKNOWN = "outcome_unknown"


class GrantState(StrEnum):
    """Life of a grant; it moves forward only."""

    ISSUED = "issued"
    BEGUN = "begun"
    SETTLED = "settled"
    REVOKED = "revoked"  # by a halt, before its call began; only to be settled as not started


class TicketKind(StrEnum):
    """What a ticket asks of humans."""

    APPROVAL = "approval"  # whether one exact call may happen
    INPUT = "input"  # a value that an agent needs to go on; it allows nothing


PROVIDE_INPUT: Final = "provide_input"
"""How an input is given, and what stands in place of a capability in steps and tickets that ask for one.

No capability can have this id, so no release can register, allow or grant it.
"""


class TicketState(StrEnum):
    """Life of a ticket; exactly one decision ends `pending`."""

    PENDING = "pending"
    APPROVED = "approved"  # of an ask: the input was given
    DENIED = "denied"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class TicketDecision(StrEnum):
    """What an approver may say."""

    APPROVE = "approve"
    DENY = "deny"


class SystemActor(StrEnum):
    """Who acts with nobody's token, as events and the audit log name it; there are no others."""

    RECOVERY = "system:recovery"  # does what is due because time has passed, or a process died
    CHECKPOINTS = "system:checkpoints"  # signs what happened
    ARCHIVE = "system:archive"  # stores what is signed, and prunes what is stored
    CLI = "system:cli"  # a command of an operator that asks for no token


class HaltScope(StrEnum):
    """What a halt stops."""

    SYSTEM = "system"
    TENANT = "tenant"
    AGENT = "agent"
    RUN_GROUP = "run_group"
    RUN = "run"
    CAPABILITY = "capability"


class BudgetScope(StrEnum):
    """Whose budget it is, from narrow to wide; budgets are locked in this order."""

    RUN = "run"
    RUN_GROUP = "run_group"
    AGENT = "agent"
    USER = "user"
    TEAM = "team"
    MODEL = "model"
    TENANT = "tenant"


class BudgetUnit(StrEnum):
    """What every run and tenant has a limit of; a policy registers more units by their names."""

    EUR = "EUR"
    CALLS = "calls"


TOKENS = "tokens"
"""The unit of what language models read and write; known without being registered."""


class Period(StrEnum):
    """How long a budget lasts; windows begin at midnight UTC, a week on Monday, by the database's clock."""

    TOTAL = "total"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"


class Reason(StrEnum):
    """Why a proposal was refused or parked; the machine-readable half of every answer."""

    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    CAPABILITY_UNKNOWN = "capability_unknown"
    CAPABILITY_INACTIVE = "capability_inactive"
    DENIED_TENANT = "denied_tenant"
    NOT_ALLOWED_TENANT = "not_allowed_tenant"
    AGENT_INACTIVE = "agent_inactive"
    AGENT_CEILING = "agent_ceiling"
    DELEGATION_EXPIRED = "delegation_expired"
    MISSING_SCOPES = "missing_scopes"
    MODEL_NOT_ALLOWED = "model_not_allowed"
    AUTONOMY_TOO_LOW = "autonomy_too_low"
    POLICY_MISSING = "policy_missing"
    POLICY_CHANGED = "policy_changed"
    CAPABILITY_BLOCKED = "capability_blocked"
    RULE_DENIED = "rule_denied"
    EVALUATOR_DENIED = "evaluator_denied"
    EVALUATOR_FAILED = "evaluator_failed"
    STEERED = "steered"
    APPROVAL_REQUIRED = "approval_required"
    APPROVAL_DENIED = "approval_denied"
    APPROVAL_EXPIRED = "approval_expired"
    APPROVAL_MISMATCH = "approval_mismatch"
    INPUT_NOT_ALLOWED = "input_not_allowed"
    INPUT_REQUIRED = "input_required"
    INPUT_DENIED = "input_denied"
    INPUT_EXPIRED = "input_expired"
    BUDGET_EXCEEDED = "budget_exceeded"
    BUDGET_MISSING = "budget_missing"
    RESOURCE_LOCKED = "resource_locked"
    HALTED = "halted"
    STORAGE_BUSY = "storage_busy"
    GRANT_EXPIRED = "grant_expired"
    GRANT_USED = "grant_used"
    CANCEL_REQUESTED = "cancel_requested"
    LEASE_EXPIRED = "lease_expired"


class PolicyRole(StrEnum):
    """What an activated policy is there for."""

    ACTIVE = "active"  # it decides
    SHADOW = "shadow"  # it is decided by beside the active one, without effect


class EventKind(StrEnum):
    """Kinds of event in a run's or a tenant's stream."""

    RUN_CREATED = "run_created"
    RUN_REFUSED = "run_refused"  # in the tenant's stream: the run was not created
    RUN_TAKEN = "run_taken"
    RUN_PARKED = "run_parked"
    RUN_RESUMED = "run_resumed"
    RUN_CANCEL_REQUESTED = "run_cancel_requested"
    RUN_SUCCEEDED = "run_succeeded"
    RUN_FAILED = "run_failed"
    RUN_CANCELLED = "run_cancelled"
    STEP_DENIED = "step_denied"
    STEP_STEERED = "step_steered"
    STEP_GRANTED = "step_granted"
    STEP_STARTED = "step_started"
    STEP_SETTLED = "step_settled"
    STEP_RECONCILED = "step_reconciled"
    ESCALATION_RAISED = "escalation_raised"  # a run would have failed, and a human is asked first
    APPROVAL_REQUESTED = "approval_requested"
    APPROVAL_VOTED = "approval_voted"
    APPROVAL_DECIDED = "approval_decided"
    APPROVAL_COMMENTED = "approval_commented"
    APPROVAL_ESCALATED = "approval_escalated"
    APPROVAL_EXPIRED = "approval_expired"
    APPROVAL_SCOPE_REVOKED = "approval_scope_revoked"
    HALT_TRIGGERED = "halt_triggered"
    HALT_LIFTED = "halt_lifted"
    EVENTS_PRUNED = "events_pruned"
    POLICY_ACTIVATED = "policy_activated"
    SHADOW_CHANGED = "shadow_changed"
    BUDGET_SET = "budget_set"
    BUDGET_CORRECTED = "budget_corrected"
    LEASE_TAKEN = "lease_taken"
    LEASE_RELEASED = "lease_released"
    MARKER = "marker"


TERMINAL_RUN_STATES = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})
