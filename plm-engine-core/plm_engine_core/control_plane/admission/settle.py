"""Settlement: what a granted call did, written with its cost, its artifacts and its ledger rows in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_UP, Decimal
from typing import Any, Final
from uuid import UUID

from plm_shared.canonical_json import JsonRefused
from plm_shared.ledger import LedgerRecord, call_records
from plm_shared.pricing import COSTLIEST

from plm_engine_core.control_plane.admission.grants import Grant
from plm_engine_core.control_plane.admission.proposal import content_hash
from plm_engine_core.control_plane.admission.withheld import Withheld
from plm_engine_core.control_plane.amounts import SMALLEST, plain
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy.facts import Evaluation
from plm_engine_core.control_plane.record_types import wrong_type
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.storage.ports import AdmissionStore, Connection, SettleCommand
from plm_engine_core.control_plane.vocabulary import BudgetUnit, Evidence, OutcomeStatus

CAPABILITY_CALL = "capability_call"
_EUR, _CALLS = BudgetUnit.EUR.value, BudgetUnit.CALLS.value
UNSPENT = frozenset({OutcomeStatus.NOT_STARTED, OutcomeStatus.SUPERSEDED})

_MOST = Decimal(10) ** 18
_LARGEST = Decimal(10) ** 11  # the books' columns are numeric(20, 8)


@dataclass(frozen=True, kw_only=True)
class ArtifactRecord:
    """A file that a call left in the artifact store."""

    id: UUID
    name: str
    mime_type: str
    size_bytes: int
    sha256: str
    backend: str
    storage_uri: str

    def to_json(self) -> dict[str, Any]:
        """The stored form."""
        return {
            "id": str(self.id),
            "name": self.name,
            "mime_type": self.mime_type,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "backend": self.backend,
            "storage_uri": self.storage_uri,
        }


_KINDS: Final = {
    "status": OutcomeStatus,
    "evidence": Evidence,
    "error": Mapping | None,
    "usage": Mapping | None,
    "artifacts": tuple | list,
    "layers": tuple | list,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one granted call.

    `usage` is measured, in the plugin's units; None means it could not be, and the reservation is charged, as it is for
    amounts that are negative, no numbers, or 10^11 and more, which the books cannot hold. Where the evidence is
    `REPORTED`, nobody but who made the call says so: an amount counts where it is more than was reserved. `output` and
    `error` are JSON values; `error` has `category`, `message` and whatever the executor knows beyond that.

    Raises:
        InvalidRequest: a member is of another type; names it.
    """

    status: OutcomeStatus
    output: Any = None
    error: Mapping[str, Any] | None = None
    usage: Mapping[str, Decimal] | None = field(default_factory=dict)
    artifacts: Sequence[ArtifactRecord] = ()
    evidence: Evidence = Evidence.MEASURED
    layers: Sequence[str] = ()

    def __post_init__(self) -> None:
        """See above."""
        sound = (
            isinstance(self.status, OutcomeStatus)
            and isinstance(self.evidence, Evidence)
            and (self.error is None or isinstance(self.error, (dict, Mapping)))  # nearly always a dict, seen at once
            and (self.usage is None or isinstance(self.usage, (dict, Mapping)))
            and isinstance(self.artifacts, (tuple, list))
            and isinstance(self.layers, (tuple, list))
        )
        if not sound:
            raise wrong_type(self, "an outcome", _KINDS)

    @property
    def digest(self) -> str:
        """Equal for equal outcomes; settling a grant again must present the same.

        Raises:
            InvalidRequest: output or error are no JSON; names the path.
        """
        return content_hash(
            {
                "status": self.status.value,
                "output": self.output,
                "error": dict(self.error) if self.error is not None else None,
                "usage": self.usage_json() if self.usage is not None else None,
                "evidence": self.evidence.value,
                "layers": list(self.layers),
                "artifacts": [artifact.to_json() for artifact in self.artifacts],
            }
        )

    def usage_json(self) -> dict[str, str]:
        """The stored form of the usage."""
        return {unit: str(amount) for unit, amount in self.usage.items()} if self.usage else {}


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """What settlement wrote.

    Where something of what the call gave back was `withheld`, whoever settles must not hand that on: it is in no book,
    and the agent is not to see it. `replayed` says that the grant was settled before, with this outcome.
    """

    status: OutcomeStatus
    spent: Mapping[str, str]
    withheld: Withheld | None = None
    replayed: bool = field(default=False, compare=False, repr=False)


async def settle(
    grant: Grant,
    outcome: Outcome,
    *,
    fencing_token: int,
    capability: CapabilityDescriptor,
    trace_id: str,
    actor: str,
    storage: AdmissionStore,
    withheld: Withheld | None = None,
    evaluations: Sequence[Evaluation] = (),
    connection: Connection | None = None,
) -> Settlement:
    """Close a grant with what its call did.

    What is `withheld` of it stands in no book: neither output nor error nor artifacts; its status and cost do, and it
    is told apart from other outcomes by its own digest all the same. `evaluations` are what evaluators said of it, and
    stand in its ledger rows.

    `fencing_token` is that of the lease the caller holds now, which may be later than the grant's own. An overspend is
    charged in full. What never started, or is superseded by a repeat under the same step key, costs nothing.

    Raises:
        InvalidRequest: the outcome holds what is no JSON, or a usage that is no Decimal; or `connection` holds no READ
            COMMITTED transaction, or one of another tenant, or one in which nothing can be written.
        FencingLost: another run worker holds the run; nothing was written, the ledger rows included.
        IdempotencyConflict: the grant was already settled with another outcome.
        StorageUnavailable: nothing was written; settling again is safe.
    """
    command = _command(
        grant,
        outcome,
        fencing_token=fencing_token,
        capability=capability,
        trace_id=trace_id,
        actor=actor,
        withheld=withheld,
        evaluations=evaluations,
    )
    answer = await storage.settle(command, connection=connection)
    return Settlement(
        status=OutcomeStatus(answer["status"]),
        spent=answer.get("spent") or {},
        withheld=withheld,
        replayed=bool(answer.get("replayed")),
    )


async def expire(
    grant: Grant,
    outcome: Outcome,
    *,
    fencing_token: int,
    capability: CapabilityDescriptor,
    trace_id: str,
    actor: str,
    storage: AdmissionStore,
) -> bool:
    """Close a grant that ran out before its call began, whoever holds its run; says whether it was so.

    Raises:
        StorageUnavailable: nothing was written; doing it again is safe.
    """
    return await storage.expire(
        _command(grant, outcome, fencing_token=fencing_token, capability=capability, trace_id=trace_id, actor=actor)
    )


def _command(
    grant: Grant,
    outcome: Outcome,
    *,
    fencing_token: int,
    capability: CapabilityDescriptor,
    trace_id: str,
    actor: str,
    withheld: Withheld | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> SettleCommand:
    """An outcome as it is booked."""
    charges = _charges(outcome, capability)
    digest = outcome.digest
    if withheld is not None:
        outcome = replace(outcome, output=None, error=withheld.in_place_of(outcome.error), artifacts=())
    return SettleCommand(
        tenant_id=grant.tenant_id,
        run_id=grant.run_id,
        step_index=grant.step_index,
        attempt=grant.attempt,
        grant_id=grant.id,
        fencing_token=fencing_token,
        status=outcome.status,
        outcome_digest=digest,
        evidence=outcome.evidence,
        output=outcome.output,
        error=dict(outcome.error) if outcome.error is not None else None,
        usage=outcome.usage_json(),
        charges=charges,
        artifacts=[artifact.to_json() for artifact in outcome.artifacts],
        trace_id=trace_id,
        actor=actor,
        ledger=_ledger(grant, outcome, capability, trace_id, charges, evaluations),
    )


def _charges(outcome: Outcome, capability: CapabilityDescriptor) -> dict[str, str]:
    """Amount per unit; a unit left out is charged as reserved."""
    if outcome.status in UNSPENT:
        return dict.fromkeys((_EUR, _CALLS, *capability.cost.max_usage), "0")
    usage = None if outcome.status is OutcomeStatus.OUTCOME_UNKNOWN else _measured(outcome.usage)
    if usage is None:
        return {_CALLS: "1"}
    if not usage and outcome.evidence is not Evidence.REPORTED:
        return {_EUR: "0", _CALLS: "1"}
    amounts = {unit: amount for unit, amount in usage.items() if amount < _LARGEST}
    amounts.pop(_EUR, None)  # what a call cost follows from our prices, never from what it says
    cost = capability.cost.price(usage)
    if cost < COSTLIEST:
        amounts[_EUR] = cost
    if outcome.evidence is Evidence.REPORTED:
        bounds = {_EUR: capability.cost.max_eur, **capability.cost.max_usage}
        amounts = {unit: amount for unit, amount in amounts.items() if amount > bounds.get(unit, 0)}
    return {**{unit: _rounded_up(amount) for unit, amount in amounts.items()}, _CALLS: "1"}


def _measured(usage: Mapping[str, Decimal] | None) -> Mapping[str, Decimal] | None:
    """The usage, or None when it is no measurement."""
    _check_usage(usage or {})
    if usage is None or not all(amount.is_finite() and 0 <= amount < _MOST for amount in usage.values()):
        return None
    return usage


def _check_usage(usage: Mapping[str, object]) -> None:
    for unit, amount in usage.items():
        if not isinstance(amount, Decimal):
            problem = f"the usage in {unit:.80} must be a Decimal, not {amount!r:.80}"
            raise InvalidRequest(problem, field=f"usage.{unit}")


def _rounded_up(amount: Decimal) -> str:
    """To the digits that the books hold."""
    return str(plain(amount.quantize(SMALLEST, rounding=ROUND_UP)))


def _ledger(
    grant: Grant,
    outcome: Outcome,
    capability: CapabilityDescriptor,
    trace_id: str,
    charges: Mapping[str, str],
    evaluations: Sequence[Evaluation],
) -> tuple[LedgerRecord, ...]:
    """One telemetry row and one connector row for a call that left the host, keyed by the grant's own span."""
    if outcome.status in UNSPENT:
        return ()
    asked = {"evaluations": [each.to_json() for each in evaluations]} if evaluations else {}
    try:
        return call_records(
            tenant_id=grant.tenant_id,
            run_id=grant.run_id,
            trace_id=trace_id,
            span_id=grant.span_id,
            event_type=CAPABILITY_CALL,
            connector_id=capability.plugin,
            capability=capability.id,
            facts={
                "step": grant.step_index,
                "attempt": grant.attempt,
                "grant_id": str(grant.id),
                "status": str(outcome.status),
                "evidence": str(outcome.evidence),
                "layers": list(outcome.layers),
                **asked,
            },
            cost_eur=charges.get(_EUR),
        )
    except JsonRefused as error:
        within, _, path = error.path.partition("payload.")
        if within:  # the whole is too large, and nothing else in it can be
            path = "layers"
        raise InvalidRequest(f"it cannot be recorded: {path}: {error.problem}", field=path) from error
