"""The one composition root: every part is made here and handed to those who need it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from plm_engine_core.agent_runtime import Driver, Selector
from plm_engine_core.control_plane import ControlPlane
from plm_engine_core.control_plane.activation import Roles
from plm_engine_core.control_plane.admission.evaluators import EvaluatorRegistry
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events import Signer, load_signer
from plm_engine_core.control_plane.events.archive import Archive, Archivist, open_archive
from plm_engine_core.control_plane.events.checkpointer import Checkpointer
from plm_engine_core.control_plane.identity import (
    IdentityProvider,
    PostgresAuditSink,
    SystemIdentities,
    provider_from_environment,
)
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.recovery import Recovery
from plm_engine_core.control_plane.registry import load_agents
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.storage.postgres.gateway import Pool
from plm_engine_core.control_plane.storage.postgres.signals import PostgresSignals
from plm_shared.addresses import driver_dsn
from plm_shared.artifact_store import ArtifactStorageBackend, LocalFilesystemBackend, ObjectStoreBackend, open_store
from plm_shared.cancellation import kept_cancel
from plugin_substrate.manager import PluginManager
from plugin_substrate.queue import JobQueue

from plm_backend.artifacts import Artifacts
from plm_backend.catalog import AgentCatalog
from plm_backend.errors import SetupError
from plm_backend.executors import PluginExecutor
from plm_backend.operator_files import read_files
from plm_backend.plugin_promises import check_capabilities
from plm_backend.reachability import Reachability
from plm_backend.run_queue import ProcrastinateDelivery, deliver
from plm_backend.settings import Settings
from plm_backend.signals import SignalHub
from plm_backend.state import events_key
from plm_backend.tasks import end

logger = logging.getLogger(__name__)

# As each artifact's row names the store that has its bytes.
_KINDS: Mapping[type[ArtifactStorageBackend], str] = {LocalFilesystemBackend: "local", ObjectStoreBackend: "s3"}
_BEGIN_ANEW_SECONDS = 1.0
# After the heartbeat in which a run worker hears of a halt at the latest: the plugin is asked, then killed.
_CANCEL_SECONDS = 10.0
_CANCEL_AGAIN_SECONDS = 20.0  # the delivery gives its drives a moment, and then the engine its connections


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Everything one process shares; opened by `open_platform`."""

    settings: Settings
    dsn: str = field(repr=False)
    pool: Pool
    control_plane: ControlPlane
    file_policy: PolicySnapshot
    agents: AgentCatalog
    artifacts: Artifacts
    artifact_store: ArtifactStorageBackend
    identity: IdentityProvider
    audit: PostgresAuditSink
    hub: SignalHub
    database: Reachability
    verifying: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Whole chains are walked for one caller at a time: that takes a connection, a thread and much of a processor."""


@asynccontextmanager
async def open_platform(settings: Settings, dsn: str) -> AsyncIterator[Platform]:
    """Open what both the API and run workers need, on the application's connection string.

    Raises:
        SetupError: the operator must change something first.
    """
    dsn = driver_dsn(dsn)
    files = read_files(settings)
    policy = files.policy
    identity = provider_from_environment()
    pool = open_pool(dsn, max_size=settings.run_concurrency + 8)
    database = Reachability(on_return=pool.check)  # or each idle connection would fail one request
    hub = SignalHub(dsn, database=database)
    control_plane = ControlPlane(
        policy=policy,
        registry=files.registry,
        storage=PostgresStorage(pool, ProcrastinateDelivery()),
        signals=PostgresSignals(pool),
        evaluators=EvaluatorRegistry.installed(),
        agents=load_agents(settings.agent_register) if settings.agent_register is not None else None,
        cancel_seconds=settings.lease_seconds + _CANCEL_SECONDS,
    )
    artifact_store = _artifact_store(settings)
    keeper = control_plane.keeper
    keeper.news = hub.policy_news
    async with pool, background(hub.listen, "signal hub"):
        _tell_difference(await keeper.refresh(), policy, settings)  # nothing is decided by a file that was replaced
        async with background(keeper.run, "policy keeper"):
            yield Platform(
                settings=settings,
                dsn=dsn,
                pool=pool,
                control_plane=control_plane,
                file_policy=policy,
                agents=files.agents,
                artifacts=Artifacts(artifact_store, name=_KINDS[type(artifact_store)]),
                artifact_store=artifact_store,
                identity=identity,
                audit=PostgresAuditSink(pool),
                hub=hub,
                database=database,
            )


def _tell_difference(standing: Roles, file: PolicySnapshot, settings: Settings) -> None:
    """Say that the policy file is not what decides, to whoever has just changed it."""
    active = standing.active
    if active is not None and active.digest != file.digest:
        logger.warning(
            "the policy file %s (%s, version %s) does not decide: policy %s, version %s, was activated at %s; "
            "`plm-cli policy activate` puts the file in force",
            settings.policy,
            file.digest[:12],
            file.version,
            str(active.digest)[:12],
            active.version,
            active.activated_at.isoformat(timespec="seconds"),
        )


@asynccontextmanager
async def run_worker(platform: Platform) -> AsyncIterator[PluginManager | None]:
    """A run worker in this process: plugins, queue, driver, delivery and recovery, until the block ends.

    With a `run_concurrency` of 0 there is none, and no plugin: other processes drive the runs.
    """
    settings = platform.settings
    if settings.run_concurrency == 0:
        yield None
        return
    signer, archive = _signer(settings), _archive(settings)
    async with AsyncExitStack() as stack:
        manager = PluginManager(
            data_dir=settings.plugin_root,
            require=settings.plugin_require,
            max_tenant_workers=settings.plugin_tenant_workers,
        )
        manager.discover_manifests()
        check_capabilities(platform.control_plane.registry, manager.get_discovered_meta)
        await stack.enter_async_context(manager)
        queue = JobQueue(manager)
        await queue.start()
        stack.push_async_callback(queue.stop)
        executor = PluginExecutor(
            manager=manager,
            queue=queue,
            artifacts=platform.artifacts,
            runs=platform.control_plane.storage.runs,
            concurrency=settings.plugin_concurrency,
            confidential=frozenset(settings.plugins_confidential),
        )
        driver = Driver(
            control_plane=platform.control_plane,
            agents=platform.agents.agent_of,
            selector=Selector([executor]),
            owner=f"{socket.gethostname()}/{os.getpid()}",
            lease_seconds=settings.lease_seconds,
            interrupts=platform.hub,
        )
        identities = SystemIdentities(platform.audit, required=settings.audit_required)
        recovery = Recovery(
            platform.control_plane.storage,
            every_seconds=settings.recovery_seconds,
            patience_seconds=settings.patience_seconds,
            artifacts=platform.artifact_store,
            artifact_grace_seconds=settings.artifact_grace_seconds,
            idempotency_seconds=settings.idempotency_seconds,
            identities=identities,
        )
        delivery = partial(deliver, platform.dsn, driver.drive, concurrency=settings.run_concurrency)
        await stack.enter_async_context(background(delivery, "delivery"))
        await stack.enter_async_context(background(recovery.run, "recovery"))
        if signer is None:
            logger.warning(
                "nothing signs what happens: PLM_EVENTS_KEY names no key; `plm-cli events new-key` makes one"
            )
        else:
            store = platform.control_plane.storage.checkpoints
            checkpointer = Checkpointer(store, signer, every_seconds=settings.checkpoint_seconds, identities=identities)
            await stack.enter_async_context(background(checkpointer.run, "checkpoints"))
        if archive is not None:
            archivist = Archivist(
                platform.control_plane.storage, archive, every_seconds=settings.archive_seconds, identities=identities
            )
            await stack.enter_async_context(background(archivist.run, "archive"))
        yield manager


def _signer(settings: Settings) -> Signer | None:
    """Who signs checkpoints here, if anybody does."""
    path = events_key(settings)
    if path is None:
        return None
    try:
        return load_signer(path)
    except InvalidRequest as error:
        raise SetupError(f"PLM_EVENTS_KEY: {error}") from error


def _artifact_store(settings: Settings) -> ArtifactStorageBackend:
    try:
        return open_store(settings.artifact_store)
    except (ValueError, ImportError, OSError) as error:
        raise SetupError(f"PLM_ARTIFACTS: {error}") from error


def _archive(settings: Settings) -> Archive | None:
    """Where what was signed is kept, if anywhere."""
    if settings.events_archive is None:
        return None
    try:
        return open_archive(settings.events_archive)
    except InvalidRequest as error:
        raise SetupError(f"PLM_EVENTS_ARCHIVE: {error}") from error


@asynccontextmanager
async def background(work: Callable[[], Awaitable[None]], name: str) -> AsyncIterator[None]:
    """Run `work` beside the block, and end it with the block; what fails unforeseen is logged and begun anew."""

    async def guarded() -> None:
        while True:
            try:
                with kept_cancel():
                    return await work()
            except Exception:
                logger.exception("the %s ended unexpectedly and begins anew", name)
                await asyncio.sleep(_BEGIN_ANEW_SECONDS)

    task = asyncio.create_task(guarded(), name=name)
    try:
        yield
    finally:
        await end([task], again_seconds=_CANCEL_AGAIN_SECONDS)
