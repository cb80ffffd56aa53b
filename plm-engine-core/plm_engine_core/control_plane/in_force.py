"""What decides in this process: policy and capabilities, exchanged as a whole while it runs.

The policy is kept in step with the record; the capabilities are this node's own, and are exchanged when it is asked to.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import Self

from plm_engine_core.control_plane.activation import Roles
from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry, ParallelPolicyEvaluator
from plm_engine_core.control_plane.errors import ControlPlaneError, InvalidRequest, PolicyMissing, StorageUnavailable
from plm_engine_core.control_plane.policy import PolicySnapshot, read_policy
from plm_engine_core.control_plane.registry import CapabilityRegistry
from plm_engine_core.control_plane.storage.ports import PolicyStore

_log = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 5.0
"""A process decides by an earlier policy for so long at most, when it missed the news of an activation."""


@dataclass(frozen=True, kw_only=True)
class Deciding:
    """What one decision is made with; a decision never sees half of an exchange."""

    policy: PolicySnapshot
    evaluators: ParallelPolicyEvaluator
    registry: CapabilityRegistry
    shadow: PolicySnapshot | None = None


@dataclass(frozen=True, kw_only=True)
class _Withdrawn:
    """Nothing decides, and why; what is registered is known all the same."""

    why: str
    registry: CapabilityRegistry


class PolicyInForce:
    """Holds what decides, behind one reference. When the activated policy cannot be loaded here, nothing does.

    Raises:
        InvalidRequest: the policy declares an evaluator that is not there, or configures one wrongly.
    """

    def __init__(self, policy: PolicySnapshot, evaluators: EvaluatorRegistry, registry: CapabilityRegistry) -> None:
        self._evaluators = evaluators
        self._now: Deciding | _Withdrawn = Deciding(
            policy=policy, evaluators=evaluators.build(policy), registry=registry
        )

    @property
    def now(self) -> Deciding:
        """What to decide with.

        Raises:
            PolicyMissing: the activated policy cannot be loaded by this process; another one may.
        """
        now = self._now
        if isinstance(now, _Withdrawn):
            raise PolicyMissing(now.why)
        return now

    @property
    def policy(self) -> PolicySnapshot | None:
        """The policy that decides; None while nothing does."""
        now = self._now
        return now.policy if isinstance(now, Deciding) else None

    @property
    def registry(self) -> CapabilityRegistry:
        """What is registered now."""
        return self._now.registry

    def register(self, registry: CapabilityRegistry) -> None:
        """Go by these capabilities from the next decision on."""
        self._now = replace(self._now, registry=registry)

    def install(self, policy: PolicySnapshot, *, shadow: PolicySnapshot | None = None) -> None:
        """Decide by this policy from the next decision on.

        Raises:
            InvalidRequest: as when made; what decided before still does.
        """
        evaluators = self._evaluators.build(policy)
        self._now = Deciding(policy=policy, evaluators=evaluators, registry=self.registry, shadow=shadow)

    def withdraw(self, why: str) -> None:
        """Decide nothing until the next `install`."""
        self._now = _Withdrawn(why=why, registry=self.registry)


class PolicyKeeper:
    """Keeps a process in step with the activations; `file` decides until there is one.

    It looks when it is entered and until it is left, every few seconds, and at once when `news` is set because an
    activation may have been made.
    """

    def __init__(
        self,
        in_force: PolicyInForce,
        store: PolicyStore,
        *,
        file: PolicySnapshot,
        news: asyncio.Event | None = None,
        every_seconds: float = LOOK_EVERY_SECONDS,
    ) -> None:
        self._in_force = in_force
        self._store = store
        self._file = file
        self._every = every_seconds
        self._seen: tuple[str | None, str | None] = (None, None)
        self.news = news or asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Look once, so that nothing is decided by a file that was replaced, and then keep looking.

        Raises:
            StorageUnavailable, InvalidRequest: as for `refresh`.
        """
        await self.refresh()
        self._running = asyncio.create_task(self.run(), name="policy keeper")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def refresh(self) -> Roles:
        """Look which policies stand and install what is new.

        Raises:
            StorageUnavailable: that cannot be seen now; what decided before still does.
            InvalidRequest: the activated policy cannot be loaded here; nothing is decided by this process any more.
        """
        standing = await self._store.standing()
        if standing.digests != self._seen:
            active, shadow = standing.digests
            try:
                policy = self._file if active is None else await self._load(active)
                self._in_force.install(policy, shadow=await self._load_shadow(shadow))
            except StorageUnavailable:
                raise
            except ControlPlaneError as error:
                self._seen = (None, None)
                self._in_force.withdraw(f"the active policy {active} cannot be loaded by this process: {error}")
                raise
            self._seen = standing.digests
            _log.info("policy %s decides%s", policy.digest, f", {shadow} is its shadow" if shadow else "")
        return standing

    async def run(self) -> None:
        """Refresh until cancelled: on news, and every few seconds, which is what counts."""
        while True:
            try:
                async with asyncio.timeout(self._every):
                    await self.news.wait()
            except TimeoutError:
                pass  # news may have been lost
            self.news.clear()
            try:
                await self.refresh()
            except StorageUnavailable:
                continue  # the database is gone: nothing can be admitted either
            except ControlPlaneError as error:
                _log.error("nothing is decided by this process: %s", error)  # one line a look is enough

    async def _load(self, digest: str) -> PolicySnapshot:
        policy = read_policy(await self._store.content(digest), source=f"policy {digest[:12]}")
        if policy.digest != digest:  # another release would read it otherwise than the one that was approved
            raise InvalidRequest(f"it reads as policy {policy.digest} in this release", field="policy")
        return policy

    async def _load_shadow(self, digest: str | None) -> PolicySnapshot | None:
        """The shadow; one that cannot be loaded is told, and keeps nothing from being decided."""
        if digest is None:
            return None
        try:
            return await self._load(digest)
        except ControlPlaneError as error:
            _log.warning("the shadow policy cannot be loaded, so it sees nothing: %s", error)
            return None
