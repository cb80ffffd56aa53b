"""What is legal in a policy and probably not meant, told before it is in force."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from plm_engine_core.control_plane.document_places import entries_in
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.matching import Match, any_of
from plm_engine_core.control_plane.oauth_scopes import FORM_IN_WORDS, is_oauth_scope
from plm_engine_core.control_plane.policy.conditions import TimeOfDay, leaves
from plm_engine_core.control_plane.policy.rules import Effect, Rule
from plm_engine_core.control_plane.policy.snapshot import PolicySnapshot, evaluators_in
from plm_engine_core.control_plane.registry.capabilities import CapabilityDescriptor
from plm_engine_core.control_plane.vocabulary import ActionTier, AutonomyLevel, CapabilityMode, EvaluationPhase

_STRICTNESS = {Effect.DENY: 0, Effect.STEER: 1, Effect.ASK: 2, Effect.RAISE_RISK: 3}


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"  # it does not do what it says
    WARNING = "warning"  # it does, and somebody should have looked at it


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One remark about one place of a policy."""

    severity: Severity
    check: str
    at: str
    message: str


def lint(policy: PolicySnapshot, capabilities: Iterable[CapabilityDescriptor]) -> tuple[Remark, ...]:
    """Every remark about a policy for these capabilities, errors first, in the order of the policy."""
    known = tuple(capabilities)
    remarks = [
        *_unknown(policy, known),
        *_held_by_nobody(policy),
        *_matching_nothing(policy, known),
        *_doubled(policy.rules),
        *_unreachable(policy, known),
        *_never_holding(policy),
        *_idle(policy),
        *_never_given_back(policy, known),
        *_writes_without_a_human(policy, known),
        *_never_running(policy, known),
        *_without_cost_bound(policy, known),
    ]
    return tuple(sorted(remarks, key=lambda remark: remark.severity is not Severity.ERROR))


def require_known_names(
    policy: PolicySnapshot, capabilities: Iterable[CapabilityDescriptor], *, source: str | Path
) -> None:
    """Refuse a policy that names what does not exist: it would not do what it says.

    Raises:
        InvalidRequest: naming `source` and the entry; where `source` is the file of the policy, with line and column.
    """
    first = next(iter(lint(policy, capabilities)), None)
    if first is not None and first.severity is Severity.ERROR:
        place = entries_in(source)(first.at) if isinstance(source, Path) else source
        raise InvalidRequest(f"{place}: {first.at}: {first.message}", field=first.at)


def _error(check: str, at: str, message: str) -> Remark:
    return Remark(severity=Severity.ERROR, check=check, at=at, message=message)


def _warning(check: str, at: str, message: str) -> Remark:
    return Remark(severity=Severity.WARNING, check=check, at=at, message=message)


def _unknown(policy: PolicySnapshot, known: Sequence[CapabilityDescriptor]) -> Iterator[Remark]:
    ids = {each.id for each in known}
    tables = {
        "tiers": policy.tiers,
        "guidance": policy.guidance,
        "risk_by_capability": policy.risk_by_capability,
        "autonomy_ceiling_by_capability": policy.autonomy_ceiling_by_capability,
    }
    for member, table in tables.items():
        for name in table:
            if name not in ids:
                words = f"{name} is not registered, so this says nothing; correct the name or register it"
                yield _error("unknown-capability", f"{member}.{name}", words)


def _held_by_nobody(policy: PolicySnapshot) -> Iterator[Remark]:
    """OAuth scopes without which nobody may approve, and which nobody can have."""
    for place, scope in policy.approval.scopes.items():
        if not is_oauth_scope(scope):
            yield _error("impossible-scope", f"approval.{place}", f"{scope!r:.80} is asked for: {FORM_IN_WORDS}")


def _matching_nothing(policy: PolicySnapshot, known: Sequence[CapabilityDescriptor]) -> Iterator[Remark]:
    places = {f"rules.{rule.id}": rule.capabilities for rule in policy.rules}
    places |= {f"evaluators.{spec.name}": spec.capabilities for spec in policy.evaluators}
    patterns_of_runs = policy.run_risk.patterns if policy.run_risk is not None else ()
    places |= {f"run_risk.patterns.{each.id}": each.sequence for each in patterns_of_runs}
    for place, patterns in places.items():
        for pattern in patterns:
            if pattern != "*" and not _covered((pattern,), known):
                words = f"{pattern} matches no registered capability"
                yield _error("matches-nothing", place, words)


def _covered(patterns: tuple[str, ...], known: Iterable[CapabilityDescriptor]) -> frozenset[str]:
    matches = any_of(patterns, Match.GLOB)
    return frozenset(each.id for each in known if matches(each.id))


def _doubled(rules: Sequence[Rule]) -> Iterator[Remark]:
    seen: dict[str, str] = {}
    for rule in rules:
        content = rule.model_dump_json(exclude={"id", "reason", "guidance"})
        if content in seen:
            yield _warning("doubled", f"rules.{rule.id}", f"it says what rules.{seen[content]} says; remove one")
        seen.setdefault(content, rule.id)


def _unreachable(policy: PolicySnapshot, known: Sequence[CapabilityDescriptor]) -> Iterator[Remark]:
    """Rules that another one without a condition always answers before, or whose capabilities are all blocked."""
    blocked = {each.id for each in known if policy.tier_of(each.id, each.mode) is ActionTier.BLOCKED}
    for index, rule in enumerate(policy.rules):
        left = _covered(rule.capabilities, known)
        if not left:
            continue
        if left <= blocked:
            words = "every capability it names is blocked anyway"
            yield _warning("unreachable", f"rules.{rule.id}", words)
            continue
        for place, other in enumerate(policy.rules):
            if (
                other.when is None
                and _before(other, place, rule, index)
                and left <= _covered(other.capabilities, known)
            ):
                words = f"rules.{other.id} applies to all of it and answers first"
                yield _warning("unreachable", f"rules.{rule.id}", words)
                break


def _before(other: Rule, place: int, rule: Rule, index: int) -> bool:
    """Whether `other` answers before `rule`: stricter, or as strict and earlier. A raised risk answers nothing."""
    if other is rule or Effect.RAISE_RISK in (other.then, rule.then):
        return False
    return (_STRICTNESS[other.then], place) < (_STRICTNESS[rule.then], index)


def _never_holding(policy: PolicySnapshot) -> Iterator[Remark]:
    """Parts of the day that are over when they begin: a rule that waits for one never applies."""
    for place, tree in policy.conditions().items():
        for leaf in leaves(tree):
            if not isinstance(leaf, TimeOfDay):
                continue
            if not leaf.weekdays:
                yield _error("never-holds", place, "weekdays is empty; name some, or leave it out for all")
            elif leaf.start == leaf.end or (leaf.start, leaf.end) == ("24:00", "00:00"):
                words = f"no time is from {leaf.start} to {leaf.end}; leave start and end out for the whole day"
                yield _error("never-holds", place, words)


def _idle(policy: PolicySnapshot) -> Iterator[Remark]:
    asked = frozenset[str]().union(*map(evaluators_in, policy.conditions().values()))
    for spec in policy.evaluators:
        if not spec.gate and spec.name not in asked:
            words = "it is no gate and no condition asks it; make it a gate or remove it"
            yield _warning("idle", f"evaluators.{spec.name}", words)
    for name in policy.guidance:
        if policy.tiers.get(name) is not ActionTier.STEER:
            yield _warning("idle", f"guidance.{name}", "nobody is given it: the capability is not steered")


def _never_given_back(policy: PolicySnapshot, known: Sequence[CapabilityDescriptor]) -> Iterator[Remark]:
    """Evaluators of outputs of capabilities that never run."""
    still = (ActionTier.BLOCKED, ActionTier.STEER)
    running = [each for each in known if policy.tier_of(each.id, each.mode) not in still]
    for spec in policy.evaluators:
        named = spec.phase is EvaluationPhase.OUTPUT and _covered(spec.capabilities, known)
        if named and not _covered(spec.capabilities, running):
            words = "every capability it names is blocked or steered, so none gives anything back"
            yield _warning("idle", f"evaluators.{spec.name}", words)


def _writes_without_a_human(policy: PolicySnapshot, known: Sequence[CapabilityDescriptor]) -> Iterator[Remark]:
    alone = (ActionTier.AUTO_APPROVE, ActionTier.UNRESTRICTED)
    for each in known:
        tier = policy.tier_of(each.id, each.mode)
        if each.mode is CapabilityMode.EXECUTE_WRITE and tier in alone and _ceiling(policy, each) is AutonomyLevel.L3:
            words = f"{each.id} changes something and may run without a human ({tier.value})"
            yield _warning("write-without-human", _tier_place(policy, each), words)


def _never_running(policy: PolicySnapshot, known: Sequence[CapabilityDescriptor]) -> Iterator[Remark]:
    for each in known:
        tier = policy.tier_of(each.id, each.mode)
        if tier in (ActionTier.BLOCKED, ActionTier.STEER):
            continue
        plan = policy.plans.of(each)
        if not plan.autonomy[AutonomyLevel.L3].passed:
            yield _warning("never-runs", "autonomy_ceiling", plan.autonomy[AutonomyLevel.L3].detail)
        elif not plan.cost.passed:
            yield _warning("never-runs", "max_eur_per_call", f"{each.id}: {plan.cost.detail}")


def _without_cost_bound(policy: PolicySnapshot, known: Sequence[CapabilityDescriptor]) -> Iterator[Remark]:
    if policy.max_eur_per_call is None:
        yield _warning("no-cost-bound", "max_eur_per_call", "without it one call may cost what its run has left")
    for each in known:
        if each.cost.max_eur == 0 and any(each.cost.eur_per_unit.values()):
            words = f"{each.id} has a price and reserves nothing; give it a cost.max_eur, or it overspends"
            yield _warning("no-cost-bound", f"capabilities.{each.id}.cost", words)


def _ceiling(policy: PolicySnapshot, capability: CapabilityDescriptor) -> AutonomyLevel:
    own = policy.autonomy_ceiling_by_capability.get(capability.id, AutonomyLevel.L3)
    return min(policy.autonomy_ceiling, own, key=lambda level: level.rank)


def _tier_place(policy: PolicySnapshot, capability: CapabilityDescriptor) -> str:
    return f"tiers.{capability.id}" if capability.id in policy.tiers else f"tier_by_mode.{capability.mode.value}"
