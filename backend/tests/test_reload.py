"""SIGHUP has a node read its capability file and its plans anew, whole or not at all, while it goes on working."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from plm_backend.operator_files import read_files
from plm_backend.reloading import Reloading
from plm_backend.settings import Settings
from plm_backend.stopping import ReloadRequest, StopRequest
from plm_engine_core.control_plane import ControlPlane
from plm_engine_core.control_plane.identity.audit import InMemoryAuditSink
from plm_engine_core.control_plane.storage.memory import MemoryStorage
from plugin_substrate.manager import PluginManager

PLATFORM = Path(__file__).parent / "platform"
DEV = Path(__file__).parents[2] / "dev"
DESCRIBED = yaml.safe_load((PLATFORM / "capabilities.yaml").read_text(encoding="utf-8"))["capabilities"]
USED = {"unit": "page", "amount": "1"}


class Files:
    """A node's capability file and plans, which a test changes."""

    def __init__(self, folder: Path) -> None:
        self.capabilities = folder / "capabilities.yaml"
        self.agents = folder / "agents"
        shutil.copytree(PLATFORM / "agents", self.agents)
        self.write(DESCRIBED)

    def write(self, capabilities: list[dict[str, Any]]) -> None:
        """Write all capabilities; whoever reads meanwhile reads the old or the new ones."""
        draft = self.capabilities.with_suffix(".draft")
        draft.write_text(yaml.safe_dump({"capabilities": capabilities}), encoding="utf-8")
        draft.rename(self.capabilities)

    def change(self, capability_id: str, **members: Any) -> None:
        """Describe one capability otherwise than the platform of the tests does."""
        self.write([{**each, **members} if each["id"] == capability_id else each for each in DESCRIBED])

    def without(self, capability_id: str) -> None:
        """Leave one capability out."""
        self.write([each for each in DESCRIBED if each["id"] != capability_id])


class Node:
    """A server whose files change under it."""

    def __init__(self, server: Any, files: Files, until: Callable[..., Any]) -> None:
        self.server, self.files, self._until = server, files, until
        self.client = server.client()
        self._rows = server.database()

    def records(self) -> list[dict[str, Any]]:
        """What the audit log says of reloads."""
        found = self._rows.execute(
            "SELECT payload FROM audit_log_system WHERE event_type = 'capabilities.reload' ORDER BY created_at, id"
        ).fetchall()
        return [payload for (payload,) in found]

    def reload(self) -> dict[str, Any]:
        """Ask for the files to be read anew, and answer what is recorded of it."""
        before = len(self.records())
        self.server.process.send_signal(signal.SIGHUP)
        self._until(lambda: len(self.records()) > before, "the reload is recorded")
        return self.records()[-1]

    def registered(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What the node says is registered."""
        items = self.client.get("/v1/capabilities").json()["items"]
        return {(each["id"], each["version"]): each for each in items}

    def decisions(self, run_id: str) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
        """What each attempt of a run was decided on, what it reserved, and what it spent in EUR."""
        found = self._rows.execute(
            "SELECT s.decision #> '{facts,capability}', s.decision -> 'reserve', e.payload::jsonb #>> '{spent,EUR}' "
            "FROM run_steps AS s LEFT JOIN events AS e ON e.tenant_id = s.tenant_id AND e.stream = 'run/' || s.run_id "
            "AND e.kind = 'step_settled' AND (e.payload::jsonb ->> 'step')::integer = s.step_index "
            "AND (e.payload::jsonb ->> 'attempt')::integer = s.attempt "
            "WHERE s.run_id = %s ORDER BY s.step_index, s.attempt",
            [run_id],
        )
        return found.fetchall()


@pytest.fixture
def started(launch: Any, until: Any, tmp_path: Path) -> Callable[..., Any]:
    """Starts a node with files of its own."""

    @contextmanager
    def start(**settings: str) -> Iterator[Node]:
        files = Files(tmp_path)
        own = {"PLM_CAPABILITIES": str(files.capabilities), "PLM_AGENTS": str(files.agents)}
        with launch(**own, **settings) as server:
            yield Node(server, files, until)

    return start


def test_what_the_files_say_is_in_force_as_a_whole(started: Any) -> None:
    with started() as node:
        with_plan = node.files.agents / "usage.yaml"
        kept = with_plan.read_text(encoding="utf-8")
        with_plan.unlink()
        node.files.without("probe.usage")
        gone = node.reload()
        assert (gone["outcome"], gone["by"], gone["file"]) == ("reloaded", "SIGHUP", str(node.files.capabilities))
        assert gone["changes"] == {
            "added": [],
            "removed": [{"id": "probe.usage", "version": "1", "status": "active"}],
            "changed": [],
        }
        assert ("probe.usage", "1") not in node.registered()
        refused = node.client.post("/v1/runs", json={"agent": "usage", "inputs": USED, "files": {}})
        assert refused.status_code == 422
        assert "there is no agent 'usage'" in refused.text

        with_plan.write_text(kept, encoding="utf-8")
        node.files.change("probe.usage", version="2", cost={"max_eur": "0.5", "eur_per_unit": {"page": "0.02"}})
        back = node.reload()
        assert back["changes"]["added"] == [{"id": "probe.usage", "version": "2", "status": "active"}]
        run = node.client.finished(node.client.run("usage", **USED)["run_id"])
        assert run["state"] == "succeeded"
        ((described, reserved, spent),) = node.decisions(run["run_id"])
        assert (described["version"], reserved["EUR"], spent) == ("2", "0.5", "0.02")

        log = node.server.log.read_text(encoding="utf-8")
        assert "as SIGHUP asked: removed probe.usage 1 (was active)" in log
        assert "as SIGHUP asked: added probe.usage 2 (active)" in log


def _no_yaml(files: Files) -> None:
    files.capabilities.write_text("capabilities: [", encoding="utf-8")


BAD: dict[str, tuple[Callable[[Files], None], tuple[str, ...]]] = {
    "there is none": (lambda files: files.capabilities.unlink(), ("capabilities.yaml cannot be read",)),
    "it is no YAML": (_no_yaml, ("capabilities.yaml is not YAML: line 1",)),
    "an entry is none": (
        lambda files: files.change("probe.echo", colour="red"),
        ("capabilities.yaml:", "capabilities.0.colour"),
    ),
    "a version stands twice": (
        lambda files: files.write([*DESCRIBED, DESCRIBED[0]]),
        ("capabilities.yaml:", "version 1 of capability probe.echo is registered twice"),
    ),
    "the policy names what is gone": (
        lambda files: files.without("probe.blocked"),
        ("policy.yaml:4:38: tiers.probe.blocked", "is not registered"),
    ),
    "a plan names what is gone": (
        lambda files: files.without("probe.fail"),
        ("fail.yaml: capability probe.fail is not registered",),
    ),
    "a plan is none": (
        lambda files: (files.agents / "broken.yaml").write_text("agent: broken\n", encoding="utf-8") and None,
        ("broken.yaml",),
    ),
    "it promises more than its plugin does": (
        lambda files: files.change("fragile.append", idempotent=True),
        ("capability fragile.append is registered as idempotent, but plugin fragile",),
    ),
}


def test_with_an_error_in_them_all_that_was_in_force_stays_and_the_node_goes_on(started: Any) -> None:
    with started() as node:
        before = node.registered()
        for case, (spoil, words) in BAD.items():
            spoil(node.files)
            record = node.reload()
            assert record["outcome"] == "refused", case
            for word in words:
                assert word in record["message"], case
                assert word in node.server.log.read_text(encoding="utf-8"), case
            assert node.registered() == before, case
            assert node.client.finished(node.client.run("echo", value=case)["run_id"])["result"] == {"value": case}
            node.files.write(DESCRIBED)
            (node.files.agents / "broken.yaml").unlink(missing_ok=True)
        assert node.reload()["changes"] == {"added": [], "removed": [], "changed": []}


def test_the_active_policy_is_asked_and_not_only_the_file(started: Any, tmp_path: Path) -> None:
    with started() as node:
        policy = yaml.safe_load((PLATFORM / "policy.yaml").read_text(encoding="utf-8"))
        policy["tiers"]["probe.usage"] = "unrestricted"
        operator = node.server.client(scopes=("plm.policy.activate",))
        made = operator.post("/v1/policy/activations", json={"policy": policy, "previous": None, "reason": "a test"})
        assert made.status_code in (200, 201), made.text
        (node.files.agents / "usage.yaml").unlink()
        node.files.without("probe.usage")
        record = node.reload()
        assert record["outcome"] == "refused"
        assert "the active policy" in record["message"]
        assert "tiers.probe.usage" in record["message"]


def test_a_call_ends_as_what_it_began_and_the_next_one_is_decided_anew(started: Any, gate: Any) -> None:
    with started() as node:
        run_id = node.client.run("hold-then-echo", gate=str(gate))["run_id"]
        gate.entered()
        anew = [{**each, "version": "2"} if each["plugin"] == "probe" else each for each in DESCRIBED]
        node.files.write(anew)
        assert node.reload()["outcome"] == "reloaded"
        gate.open()
        assert node.client.finished(run_id)["state"] == "succeeded"
        first, second = node.decisions(run_id)
        assert ("version" in first[0], second[0]["version"]) == (False, "2")


def test_what_was_approved_is_not_done_as_something_else(started: Any, until: Any) -> None:
    with started() as node:
        approver = node.server.client(scopes=("plm.hitl.resolve",))

        def approve() -> str:
            (ticket,) = approver.get("/v1/approvals", params={"state": "pending"}).json()["items"]
            answer = approver.post(f"/v1/approvals/{ticket['ticket_id']}/decision", json={"decision": "approve"})
            assert answer.status_code == 200, answer.text
            return str(ticket["ticket_id"])

        def approved(**members: Any) -> tuple[str, str]:
            run_id = node.client.run("write")["run_id"]
            node.client.wait(run_id, "approval_requested")
            node.files.change("probe.write", **members)
            assert node.reload()["outcome"] == "reloaded"
            return run_id, approve()

        reworded, _ = approved(description="Write, with other words")
        assert node.client.finished(reworded)["state"] == "succeeded"
        dearer, before = approved(description="Write, with other words", cost={"max_eur": "0.9"})
        assert node.client.wait(dearer, "step_denied")["answer"]["reason"] == "approval_mismatch"
        until(lambda: node.client.get(f"/v1/runs/{dearer}").json()["state"] == "awaiting_approval", "it asks anew")
        assert approve() != before
        assert node.client.finished(dearer)["state"] == "succeeded"


def _of_version(number: int) -> list[dict[str, Any]]:
    """Version n costs n times as much in every way, so that a call of two of them would show."""
    cost = {"max_eur": f"0.{number}", "eur_per_unit": {"page": f"0.0{number}"}}
    return [
        {**each, "version": str(number), "cost": cost} if each["id"] == "probe.usage" else each for each in DESCRIBED
    ]


def test_under_load_nothing_is_lost_and_nothing_decided_on_a_mixture(started: Any, tmp_path: Path, until: Any) -> None:
    """Files good and bad in turn, read by a server and a run worker, while runs are created and driven by both."""
    with started(PLM_RUN_CONCURRENCY="4") as node, _worker(node, tmp_path, until) as worker:
        node.files.write(_of_version(2))
        node.reload()
        worker.send_signal(signal.SIGHUP)
        until(lambda: len(node.records()) > 1, "the reload of the run worker is recorded")
        stop = False

        def exchange() -> int:
            number = 0
            while not stop:
                number += 1
                if number % 3:
                    node.files.write(_of_version(2 + number % 7))
                else:
                    node.files.without("probe.echo")
                before = len(node.records())
                for process in (node.server.process, worker):
                    process.send_signal(signal.SIGHUP)
                until(lambda seen=before: len(node.records()) > seen, "a reload is recorded")
            return number

        with ThreadPoolExecutor(5) as pool:
            exchanging = pool.submit(exchange)
            try:
                runs = list(pool.map(lambda _: _some_runs(node), range(4)))
            finally:
                stop = True
            assert exchanging.result() > 3
        ids = [run_id for each in runs for run_id in each]
        versions = set()
        for run_id in ids:
            assert node.client.finished(run_id)["state"] == "succeeded"
            ((described, reserved, spent),) = node.decisions(run_id)
            number = Decimal(described["version"]) if "version" in described else Decimal(0)
            assert Decimal(described["cost"]["max_eur"]) == Decimal(reserved["EUR"])
            if number:
                assert (Decimal(reserved["EUR"]), Decimal(spent)) == (number / 10, number / 100)
            versions.add(number)
        assert len(versions) > 1
        outcomes = [record["outcome"] for record in node.records()]
        assert {"reloaded", "refused"} == set(outcomes)
        assert len({record["node"] for record in node.records()}) == 2


def _some_runs(node: Node) -> list[str]:
    client = node.server.client()
    return [client.run("usage", **USED)["run_id"] for _ in range(10)]


@contextmanager
def _worker(node: Node, folder: Path, until: Any) -> Iterator[subprocess.Popen[bytes]]:
    log = folder / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("plm-cli"), "worker"],
            env=dict(node.server.environment),
            stdout=output,
            stderr=output,
        )
        try:
            until(lambda: b"working" in log.read_bytes() or process.poll() is not None, "the run worker works")
            yield process
            assert process.poll() is None, log.read_text(encoding="utf-8")
        finally:
            process.terminate()
            process.wait(60)


class TestRequest:
    """What SIGHUP asks for, in this process."""

    @pytest.fixture
    def request_(self) -> Iterator[ReloadRequest]:
        kept = signal.getsignal(signal.SIGHUP)
        made = ReloadRequest(StopRequest())
        made.listen()
        yield made
        signal.signal(signal.SIGHUP, kept)

    def test_one_before_anybody_waits_and_one_meanwhile_are_kept_and_several_are_one(
        self, request_: ReloadRequest
    ) -> None:
        async def answered() -> int:
            times = 0
            while True:
                try:
                    async with asyncio.timeout(5 if times < 2 else 0.2):
                        await request_.wait()
                except TimeoutError:
                    return times
                times += 1
                if times == 1:
                    os.kill(os.getpid(), signal.SIGHUP)

        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert asyncio.run(answered()) == 2


WAITING = textwrap.dedent("""
    import asyncio, sys
    from plm_backend.stopping import ReloadRequest, StopRequest

    stop = StopRequest()
    reload = ReloadRequest(stop)
    stop.listen()
    reload.listen()

    async def work():
        ends = {asyncio.create_task(stop.wait(), name="stopped"), asyncio.create_task(reload.wait(), name="reloaded")}
        await asyncio.sleep(0)  # both are begun
        open(sys.argv[1] + ".ready", "x").close()
        (first, *_), _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        open(sys.argv[1], "w").write(first.get_name())
        for each in ends:
            each.cancel()

    asyncio.run(work())
""")


@pytest.mark.parametrize(("hang_up", "told"), [(False, "reloaded"), (True, "stopped")])
def test_a_terminal_that_is_gone_ends_the_command_as_it_always_did(
    tmp_path: Path, until: Any, hang_up: bool, told: str
) -> None:
    answer = tmp_path / "answer"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", WAITING, str(answer)])  # noqa: S606  # as the child
    # It is not told by the terminal: who closes that while the process writes there has its write fail.
    until(tmp_path.joinpath("answer.ready").exists, "the process waits")
    if hang_up:
        os.close(terminal)
    else:
        os.kill(pid, signal.SIGHUP)
    until(lambda: answer.exists() and answer.read_text(encoding="utf-8"), "the process says what it heard")
    assert answer.read_text(encoding="utf-8") == told
    os.waitpid(pid, 0)
    if not hang_up:
        os.close(terminal)


class TestPlugins:
    """A node whose plugins change while it works; nothing but its files, its plugins and its control plane is there."""

    @pytest.fixture
    def manifests(self, tmp_path: Path) -> Path:
        folder = tmp_path / "plugins" / "manifests"
        folder.mkdir(parents=True)
        return folder

    @pytest.fixture
    def install(self, manifests: Path, plugins_dir: Path) -> Callable[..., None]:
        def put(name: str, **code: Any) -> None:
            manifest = json.loads((plugins_dir / "manifests" / f"{name}.json").read_text(encoding="utf-8"))
            manifest["code"] |= code
            (manifests / f"{name}.json").write_text(json.dumps(manifest), encoding="utf-8")

        return put

    @pytest.fixture
    def reloading(self, manifests: Path, install: Callable[..., None], tmp_path: Path) -> Reloading:
        """Of a node that has two of three plugins, one of them not idempotent."""
        install("bom-reader", idempotent=False)
        install("license-reviewer")
        settings = Settings(capabilities=tmp_path / "capabilities.yaml")
        self._write(settings, idempotent=False)
        manager = PluginManager(data_dir=manifests.parent)
        manager.discover_manifests()
        files = read_files(settings)
        plane = ControlPlane(policy=files.policy, registry=files.registry, storage=MemoryStorage())
        platform = SimpleNamespace(
            settings=settings, control_plane=plane, agents=files.agents, audit=InMemoryAuditSink()
        )
        return Reloading(platform, manager)  # type: ignore[arg-type]  # all of it that a reload asks

    @staticmethod
    def _write(settings: Settings, **of_reader: Any) -> None:
        described = yaml.safe_load((DEV / "capabilities.yaml").read_text(encoding="utf-8"))
        (reader,) = [each for each in described["capabilities"] if each["id"] == "bom.read"]
        reader |= of_reader
        settings.capabilities.write_text(yaml.safe_dump(described), encoding="utf-8")

    async def test_one_that_was_replaced_promises_nothing_before_a_restart(
        self, reloading: Reloading, install: Callable[..., None]
    ) -> None:
        manager, settings = reloading._manager, reloading._platform.settings
        assert manager is not None
        known = manager.get_discovered_meta("bom-reader")
        install("bom-reader", idempotent=True)
        self._write(settings, idempotent=True)
        assert await reloading.reload(by="test") is None, "its workers may be those of what was there before"
        self._write(settings, idempotent=False, description="Other words")
        assert await reloading.reload(by="test") is not None
        assert manager.get_discovered_meta("bom-reader") is known

    async def test_one_that_is_known_stays_though_its_manifest_cannot_be_read(
        self, reloading: Reloading, manifests: Path
    ) -> None:
        manager = reloading._manager
        assert manager is not None
        (manifests / "license-reviewer.json").write_text("{", encoding="utf-8")
        assert await reloading.reload(by="test") is not None
        assert manager.get_discovered_meta("license-reviewer") is not None

    async def test_a_new_one_is_taken_in_with_the_files_and_not_without_them(
        self, reloading: Reloading, install: Callable[..., None]
    ) -> None:
        manager, settings = reloading._manager, reloading._platform.settings
        assert manager is not None
        install("report-writer", idempotent=False)
        assert await reloading.reload(by="test") is None, "the file says that it is idempotent"
        assert manager.get_discovered_meta("report-writer") is None
        install("report-writer")
        self._write(settings, colour="red")
        assert await reloading.reload(by="test") is None
        assert manager.get_discovered_meta("report-writer") is None
        self._write(settings, idempotent=False)
        assert await reloading.reload(by="test") is not None
        assert manager.get_discovered_meta("report-writer") is not None


def test_the_record_is_plain_json(started: Any) -> None:
    with started() as node:
        node.files.change("probe.echo", description="Return it", allowed_tenants=[str(node.server.tenant)])
        (changed,) = node.reload()["changes"]["changed"]
        assert json.loads(json.dumps(changed))["members"] == {
            "description": {"before": "Return the argument", "after": "Return it"},
            "allowed_tenants": {"before": None, "after": [str(node.server.tenant)]},
        }
        assert ("probe.echo", "1") in node.registered()
        node.client = node.server.client(tenant=node.server.other_tenant)
        assert ("probe.echo", "1") not in node.registered()
