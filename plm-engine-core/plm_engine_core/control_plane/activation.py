"""Which policy decides: activating one is an act with an author, a reason and a record, and so is trying one as shadow.

Until the first activation every process decides by the policy file it was started with. From then on the newest
activation decides everywhere, whatever the files say.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry
from plm_engine_core.control_plane.admission.proposal import Principal, check_principal
from plm_engine_core.control_plane.errors import Conflict, Forbidden, InvalidRequest
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.policy.lint import require_known_names
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.storage.ports import PolicyStore
from plm_engine_core.control_plane.texts import word_of
from plm_engine_core.control_plane.vocabulary import EventKind, PolicyRole

ACTIVATE_SCOPE = "plm.policy.activate"
"""The policy is that of all tenants, so this OAuth scope belongs to the installation's operators."""

MAX_REASON = 2_000
MAX_CONTENT_BYTES = 1_048_576


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One act: from now on this policy has this role. Without a digest nothing has it (a shadow that ended).

    `number` grows by one with each act; `previous` is the digest that had the role before, None when none had.
    """

    number: int
    role: PolicyRole
    digest: str | None
    version: str | None
    previous: str | None
    reason: str
    activated_by: UUID
    activated_at: datetime

    @property
    def kind(self) -> EventKind:
        """What its event is called."""
        return EventKind.POLICY_ACTIVATED if self.role is PolicyRole.ACTIVE else EventKind.SHADOW_CHANGED

    def to_json(self) -> dict[str, Any]:
        """What its event says beside author and time."""
        said = ("number", "digest", "version", "previous", "reason")
        return {name: getattr(self, name) for name in said}


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The newest activation of each role; None where there was none."""

    active: Activation | None
    shadow: Activation | None

    @property
    def digests(self) -> tuple[str | None, str | None]:
        """The digest in each role."""
        return (self.active.digest if self.active else None, self.shadow.digest if self.shadow else None)


class PolicyDesk:
    """Where policies are put in force."""

    def __init__(self, store: PolicyStore, *, registry: CapabilityRegistry, evaluators: EvaluatorRegistry) -> None:
        self._store = store
        self._registry = registry
        self._evaluators = evaluators

    async def activate(
        self,
        tenant_id: UUID,
        policy: PolicySnapshot | None,
        *,
        role: PolicyRole = PolicyRole.ACTIVE,
        previous: str | None,
        reason: str,
        by: Principal,
    ) -> Activation:
        """Give a policy a role, for all tenants; without one, end the shadow.

        `previous` is the digest that the caller believes to have the role now (None: none was ever activated), so that
        of two who act at once one is refused. The act stands in the event stream of the caller's tenant. Approvals and
        grants stay bound to the policy they were given under.

        Raises:
            Forbidden: the caller is not a human, or lacks `plm.policy.activate`.
            InvalidRequest: no reason, no policy to decide by, or one that names an unknown capability or evaluator.
            Conflict: `policy_changed`: another policy has the role than `previous`.
            NotFound: the tenant does not exist.
        """
        _authorise(by)
        role = word_of(PolicyRole, role, field="role")
        if not isinstance(reason, str) or not reason.strip() or len(reason) > MAX_REASON:
            raise InvalidRequest(
                f"an activation needs a reason of at most {MAX_REASON} characters, for whoever asks why", field="reason"
            )
        if policy is None and role is PolicyRole.ACTIVE:
            raise InvalidRequest("without a policy nothing could be decided; name another one", field="policy")
        if policy is not None:
            self._check(policy)
        made = await self._store.activate(
            tenant_id, role, policy, previous=previous, reason=reason, by=by.user_id, actor=by.actor
        )
        if made is None:
            raise Conflict(
                f"the {role.value} policy is not {previous or 'unset'} any more; look which one it is, and decide anew",
                reason="policy_changed",
            )
        return made

    def _check(self, policy: PolicySnapshot) -> None:
        """Refuse what would deny everything, or could not be loaded, once it is in force."""
        if len(policy.content.encode()) > MAX_CONTENT_BYTES:
            raise InvalidRequest(f"the policy is larger than {MAX_CONTENT_BYTES} bytes", field="policy")
        require_known_names(policy, self._registry, source="the policy")
        self._evaluators.build(policy)


def require_policy_operator(by: Principal) -> None:
    """Raises: Forbidden: the caller lacks `plm.policy.activate`."""
    if ACTIVATE_SCOPE not in by.scopes:
        raise Forbidden(
            f"the policy of all tenants needs the OAuth scope {ACTIVATE_SCOPE}",
            reason="missing_scopes",
            missing_scopes=(ACTIVATE_SCOPE,),
        )


def _authorise(by: Principal) -> None:
    check_principal(by, field="by")
    if by.actor_kind != "human":
        raise Forbidden("only a human may put a policy in force", reason="not_human")
    require_policy_operator(by)
