"""A governor: in whose name, in which tenant and by which control plane functions of this process are governed."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from plm_engine_core.control_plane.admission.proposal import Principal, check_principal
from plm_engine_core.control_plane.facade import ControlPlane
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.limits.leases import check_seconds
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.policy.starter import policy_of
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.registry.written import Written, registry_of
from plm_engine_core.control_plane.run_desk import CREATE_SCOPE
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plm_engine_core.control_plane.sync import SyncControlPlane


class Governor:
    """Governs calls of functions as runs of kind `external`, one run a call; `governed` puts a function under it.

    All its runs belong to one run group, `run_group_id`, so that they can be halted and limited together. `principal`
    is who proposes; it needs `plm.runs.create` and what the capabilities require, and can never approve what it asked.
    Any number of threads and event loops may use a governor; the control plane runs in a thread of its own, which
    renews each call's lease of `lease_seconds` while it runs, and hears of halts and cancels when it does so: three
    times in that time, every ten seconds at least, and in time to end the call within the bound that the control plane
    promises. When this process is gone, recovery closes its calls.

    Raises:
        InvalidRequest: `principal` is nobody, or `lease_seconds` no time that a lease can last.
    """

    def __init__(
        self,
        plane: SyncControlPlane,
        *,
        tenant_id: UUID,
        principal: Principal,
        agent: str = "governed",
        lease_seconds: float = 60.0,
    ) -> None:
        check_principal(principal, field="principal")
        check_seconds(lease_seconds)
        self.plane = plane
        self.tenant_id = tenant_id
        self.principal = principal
        self.run_group_id = new_id()
        self.agent = agent
        self.lease_seconds = lease_seconds

    @classmethod
    def in_memory(
        cls,
        capabilities: Written | CapabilityRegistry,
        *,
        policy: PolicySnapshot | Mapping[str, Any] | str | None = None,
        scopes: frozenset[str] = frozenset(),
        storage: MemoryStorage | None = None,
    ) -> Governor:
        """A governor whose books are kept in this process, for as long as it lives.

        `capabilities` are a file's path, or modes by capability, such as `{"shop.order": "execute-write"}`. `policy` is
        a file's path, or members that take the place of those in `STARTER_POLICY`, under which reads run and a human
        approves every write. `scopes` are what the calling agent holds beside `plm.runs.create`.

        Raises:
            InvalidRequest: the policy or a capability is not what it should be; names the entry.
        """
        storage = storage or MemoryStorage()
        core = ControlPlane(policy=policy_of(policy), registry=registry_of(capabilities), storage=storage)
        principal = Principal(user_id=new_id(), actor_kind="agent", scopes=scopes | {CREATE_SCOPE})
        tenant_id = storage.add_tenant(new_id(), name="memory")
        return cls(SyncControlPlane(core), tenant_id=tenant_id, principal=principal)

    def close(self) -> None:
        """Close the control plane, once the calls under way are opened and recorded; after ten seconds in any case.

        A call that was being opened is not made, and who waits for one is told that the control plane was closed.
        """
        self.plane.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
