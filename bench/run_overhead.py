"""What governing costs: a governed step of a plugin that does nothing, beside the bare call of the same plugin.

Everything is real: PostgreSQL with fsync on, a confined plugin worker, the driver with its lease, two transactions and
one conditional update a step.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import tempfile
import time
import uuid
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
from figures import Figure, command_line, percentile, report
from plm_backend.artifacts import Artifacts
from plm_backend.database import upgrade_all
from plm_backend.executors import PluginExecutor
from plm_engine_core.agent_runtime import Driver, Plan, PlanAgent, Selector
from plm_engine_core.control_plane import ControlPlane, Principal, RunRequest
from plm_engine_core.control_plane.ids import new_id
from plm_engine_core.control_plane.policy import PolicySnapshot
from plm_engine_core.control_plane.registry import CapabilityDescriptor, CapabilityRegistry
from plm_engine_core.control_plane.storage.postgres import PostgresStorage, open_pool
from plm_engine_core.control_plane.vocabulary import BudgetUnit, CapabilityMode, RunState
from plm_shared.artifact_store import LocalFilesystemBackend
from plm_shared.embedded_postgres import EmbeddedPostgres
from plm_shared.provisioning import provision
from plugin_substrate.manager import PluginManager
from plugin_substrate.queue import JobQueue

HERE = Path(__file__).resolve().parent
RUNS_AT_ONCE = 8
BARE_CALLS = 2000

POLICY = PolicySnapshot.model_validate(
    {
        "version": "bench",
        "tier_by_mode": {"read": "unrestricted", "plan-write": "unrestricted", "execute-write": "unrestricted"},
        "risk_by_mode": {"read": "low", "plan-write": "low", "execute-write": "low"},
        "rate_limit": {"per_second": 1e6, "burst": 1e6},
        "budgets": {"run": {"EUR": "1000", "calls": "100000"}, "tenant": {"EUR": "1000000", "calls": "100000000"}},
    }
)
REGISTRY = CapabilityRegistry(
    [
        CapabilityDescriptor(
            id="bench.noop", description="Nothing", mode=CapabilityMode.READ, plugin="noop", idempotent=True
        )
    ]
)


def plan_of(steps: int) -> Plan:
    described = [{"id": f"step_{number}", "capability": "bench.noop"} for number in range(steps)]
    return Plan.model_validate({"agent": "bench", "version": "1", "steps": described})


class NoDelivery:
    """The benchmark drives its runs itself."""

    async def enqueue(
        self, connection: Any, tenant_id: uuid.UUID, run_id: uuid.UUID, *, after_seconds: float = 0.0
    ) -> None:
        pass


def install_plugin(folder: Path) -> None:
    installer = Path(sys.executable).with_name("cjm-ctl")
    plugins = HERE / "plugins" / "plugins.yaml"
    subprocess.run(
        [installer, "install-all", "--plugins", plugins, "--data-dir", folder / "plugins"],
        check=True,
        stdout=subprocess.DEVNULL,
    )


async def main(folder: Path, steps: int) -> dict[str, Figure]:
    plan = plan_of(steps)
    with EmbeddedPostgres(folder / "postgres") as server:
        urls = provision(server.admin_dsn, "bench")
        upgrade_all(urls.owner)
        tenant = uuid.uuid4()
        with psycopg.connect(urls.owner) as connection:
            connection.execute("INSERT INTO tenants (id, name) VALUES (%s, 'bench')", [tenant])
        async with open_pool(urls.app, max_size=20) as pool, PluginManager(data_dir=folder / "plugins") as manager:
            (meta,) = manager.discover_manifests()
            await manager.load_plugin_async(meta, instance_id=meta.name)
            bare = await bare_calls(manager, meta.name)
            queue = JobQueue(manager)
            await queue.start()
            control_plane = ControlPlane(policy=POLICY, registry=REGISTRY, storage=PostgresStorage(pool, NoDelivery()))
            driver = Driver(
                control_plane=control_plane,
                agents=lambda _: PlanAgent(plan),
                selector=Selector(
                    [
                        PluginExecutor(
                            manager=manager,
                            queue=queue,
                            artifacts=Artifacts(LocalFilesystemBackend(folder / "artifacts"), name="local"),
                            runs=control_plane.storage.runs,
                        )
                    ]
                ),
                owner="bench",
            )
            await governed(control_plane, driver, tenant, runs=1)  # warm the caches of plans and prepared statements
            alone, seconds_of_one = await governed(control_plane, driver, tenant, runs=1)
            _, seconds_of_many = await governed(control_plane, driver, tenant, runs=RUNS_AT_ONCE)
            await queue.stop()
    return {
        "bare plugin call, p50": Figure(value=percentile(bare, 0.5) * 1e3, unit="ms", better="lower"),
        "bare plugin call, p99": Figure(value=percentile(bare, 0.99) * 1e3, unit="ms", better="lower"),
        "added per governed step, p50": Figure(
            value=(percentile(alone, 0.5) - percentile(bare, 0.5)) * 1e3,
            unit="ms",
            better="lower",
            baseline=percentile(bare, 0.5) * 1e3,
        ),
        "added per governed step, p99": Figure(
            value=(percentile(alone, 0.99) - percentile(bare, 0.5)) * 1e3,
            unit="ms",
            better="lower",
            baseline=percentile(bare, 0.99) * 1e3,
        ),
        "governed steps, 1 run": Figure(
            value=steps / seconds_of_one, unit="/s", better="higher", baseline=1 / percentile(bare, 0.5)
        ),
        f"governed steps, {RUNS_AT_ONCE} runs at once": Figure(
            value=RUNS_AT_ONCE * steps / seconds_of_many, unit="/s", better="higher", baseline=1 / percentile(bare, 0.5)
        ),
    }


async def bare_calls(manager: PluginManager, instance_id: str) -> list[float]:
    """Seconds of each call of the plugin alone."""
    samples = []
    for _ in range(BARE_CALLS):
        started = time.perf_counter()
        await manager.execute_plugin_async(instance_id)
        samples.append(time.perf_counter() - started)
    return samples[BARE_CALLS // 10 :]


async def governed(
    control_plane: ControlPlane, driver: Driver, tenant: uuid.UUID, *, runs: int
) -> tuple[list[float], float]:
    """Seconds from one step's admission to the next one's, and from the first run's start to the last one's end."""
    principal = Principal(user_id=uuid.uuid4(), actor_kind="human", scopes=frozenset({"plm.runs.create"}))
    ids = []
    for _ in range(runs):
        run, _ = await control_plane.create_run(
            RunRequest(
                tenant_id=tenant,
                run_id=new_id(),
                agent={"name": "bench"},
                input={},
                trace_id=secrets.token_hex(16),
                budget={BudgetUnit.EUR: Decimal(10)},
            ),
            principal=principal,
        )
        ids.append(run.id)
    started = time.perf_counter()
    states = await asyncio.gather(*(driver.drive(tenant, run_id) for run_id in ids))
    elapsed = time.perf_counter() - started
    if set(states) != {RunState.SUCCEEDED}:
        raise RuntimeError(f"the runs ended as {states}")
    samples = []
    for run_id in ids:
        admitted = [step.created_at for step in await control_plane.storage.runs.steps(tenant, run_id)]
        samples += [(after - before).total_seconds() for before, after in pairwise(admitted)]
    return samples, elapsed


if __name__ == "__main__":
    parser = command_line(__doc__ or "")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (default: %(default)s)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plm-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # the database's account must pass through it when this runs as root
        install_plugin(folder)
        measured = asyncio.run(main(folder, asked.steps))
        report(f"what governing costs ({asked.steps} steps a run)", measured, as_json=asked.as_json)
