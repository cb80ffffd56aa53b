"""The layer `bubblewrap`: what a worker sees of the file tree, what else it has, and what happens where it fails."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import bubblewrap_works, take_bubblewrap_away
from plugin_substrate import PluginConfigError, PluginConfinementError, PluginManager, PluginMeta
from plugin_substrate.cli import app
from plugin_substrate.doctor import diagnose, machine_layers
from plugin_substrate.interface import CallContext
from plugin_substrate.lifecycle import bubblewrap_program
from plugin_substrate.manifest import write_manifest
from plugin_substrate.worker import bubblewrap, first_order, namespaces
from plugin_substrate.worker.confine import file_rules, make_plan
from plugin_substrate.worker.isolation import IsolationProfile, profile_to_json
from plugin_substrate.worker.landlock import Access
from plugin_substrate.worker.mount_view import DEVICE, READ, WRITE, View, Views, view_of
from plugin_substrate.worker_folder import tenant_folder
from typer.testing import CliRunner

MetaFactory = Callable[..., PluginMeta]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's")
needs_it = pytest.mark.skipif(not bubblewrap_works(), reason="this machine lets bubblewrap make no mount namespace")


@pytest.fixture
def attacker_meta(probe_meta: MetaFactory) -> MetaFactory:
    """Make the description of the attacker, which tells the errors that it meets."""
    return lambda **options: probe_meta("Attacker", module="attacker", **{"name": "attacker", **options})


async def errors_of(manager: PluginManager, *paths: Path, instance: str = "attacker", tenant: str = "") -> list[str]:
    """Have a plugin read files; the errors, empty where there is none."""
    call = CallContext("c", tenant_id=tenant)
    names = [str(path) for path in paths]
    told = await manager.execute_plugin_async(instance, action="attacker.read", paths=names, call=call)
    return [told[name] for name in names]


async def look(manager: PluginManager, *paths: Path, tenant: str = "") -> dict[str, list[str]]:
    """Have the attacker ask for files without opening them; the errors for each."""
    call = CallContext("c", tenant_id=tenant)
    names = [str(path) for path in paths]
    told: dict[str, list[str]]
    told = await manager.execute_plugin_async("attacker", action="attacker.look", paths=names, call=call)
    return told


# -- what is shown


def shown(rules: list[tuple[Path, int]]) -> tuple[dict[str, int], dict[str, str]]:
    view = view_of(tuple((str(path), access) for path, access in rules))
    return {path: manner for path, manner, *_ in view.mounts}, dict(view.links)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder whose path has no links in it."""
    return tmp_path.resolve()


def test_what_lies_in_something_shown_is_not_shown_again_unless_more_may_be_done_with_it(place: Path) -> None:
    (place / "outer/inner").mkdir(parents=True)
    outer, inner = place / "outer", place / "outer/inner"
    assert shown([(inner, Access.READ), (outer, Access.READ)]) == ({str(outer): READ}, {})
    assert shown([(inner, Access.CHANGE), (outer, Access.READ)]) == ({str(outer): READ, str(inner): WRITE}, {})
    assert shown([(inner, Access.READ), (outer, Access.CHANGE)]) == ({str(outer): WRITE}, {})
    assert shown([(inner, Access.READ), (inner, Access.CHANGE)]) == ({str(inner): WRITE}, {})


def test_names_that_begin_alike_lie_in_nothing_of_each_other(place: Path) -> None:
    for name in ("a", "a-b", "ab"):
        (place / name).mkdir()
    rules = [(place / name, Access.READ) for name in ("ab", "a-b", "a")]
    assert set(shown(rules)[0]) == {str(path) for path, _ in rules}


def test_a_path_through_links_is_shown_where_it_is_with_every_link_on_the_way(place: Path) -> None:
    (place / "versions/3.11.9/bin").mkdir(parents=True)
    (place / "versions/3.11").symlink_to("3.11.9")
    (place / "current").symlink_to(place / "versions/3.11")
    (place / "up").symlink_to("./versions/../current/bin")
    mounts, links = shown([(place / "up", Access.READ)])
    assert mounts == {str(place / "versions/3.11.9/bin"): READ}
    assert links == {
        str(place / "up"): "./versions/../current/bin",
        str(place / "current"): str(place / "versions/3.11"),
        str(place / "versions/3.11"): "3.11.9",
    }
    inside = shown([(place / "up", Access.READ), (place / "versions", Access.READ)])
    assert inside[0] == {str(place / "versions"): READ}
    assert str(place / "versions/3.11") not in inside[1], "as the folder has it already"


def test_what_leads_nowhere_shows_nothing(place: Path) -> None:
    (place / "loop").symlink_to("loop")
    (place / "gone").symlink_to("nothing")
    (place / "file").touch()
    paths = ("loop", "gone", "not there", "file/below")
    assert shown([(place / name, Access.READ) for name in paths])[0] == {}


def test_of_the_kernels_own_folder_all_is_one_and_devices_stay_devices() -> None:
    rules = [("/proc/self/status", Access.READ), ("/proc/meminfo", Access.READ), ("/dev/null", Access.DEVICE)]
    mounts, _ = shown([(Path(path), access) for path, access in [*rules, ("/dev/zero", Access.READ)]])
    assert mounts == {"/proc": READ, "/dev/null": DEVICE, "/dev/zero": DEVICE}


def test_a_view_differs_when_something_of_it_was_replaced_or_has_come(place: Path) -> None:
    (place / "one").write_text("1")
    (place / "link").symlink_to("one")
    rules = tuple((str(place / name), Access.READ) for name in ("one", "two", "link"))
    views = Views()
    seen = [views.of(rules)]
    assert views.of(rules) is seen[0]
    (place / "new").write_text("2")
    (place / "new").rename(place / "one")
    seen.append(views.of(rules))
    (place / "two").touch()
    seen.append(views.of(rules))
    (place / "link").unlink()
    (place / "link").symlink_to("two")
    seen.append(views.of(rules))
    assert len(set(seen)) == 4
    assert seen[-1] == view_of(rules)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- what a worker has of it


@needs_it
@pytest.mark.parametrize(
    "options",
    [{}, {"preload": True}, {"granted": {"processes": 4}}, {"granted": {"network": True}}],
    ids=["plain", "copied", "processes", "network"],
)
async def test_no_other_layer_is_lost_through_it(
    manager: PluginManager, attacker_meta: MetaFactory, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    layers = (await manager.load_plugin_async(attacker_meta(**options))).layers
    await manager.unload_all_async()
    take_bubblewrap_away(monkeypatch)
    without = (await manager.load_plugin_async(attacker_meta(**options))).layers
    assert layers == ("bubblewrap", *without)


@needs_it
@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees the root folder of a process that cannot be dumped")
async def test_the_whole_tree_of_a_worker_is_what_it_may_open(
    manager: PluginManager, attacker_meta: MetaFactory, place: Path
) -> None:
    (place / "granted").mkdir()
    (place / "beside").mkdir()
    view = await manager.load_plugin_async(attacker_meta(granted={"read_paths": [str(place / "granted")]}))
    seen = Path(f"/proc/{view.pid}/root")
    assert names_in(seen / place.relative_to("/")) == {"data", "granted"}
    assert names_in(seen / "dev") == {"full", "null", "random", "urandom", "zero"}
    assert "shadow" not in names_in(seen / "etc")
    assert names_in(seen) <= names_in(Path("/"))


@needs_it
async def test_a_tenants_worker_sees_no_other_tenants_folder(
    manager: PluginManager, attacker_meta: MetaFactory, place: Path
) -> None:
    await manager.load_plugin_async(attacker_meta())
    folders = {tenant: place / "data/data/attacker" / tenant_folder(tenant) for tenant in ("one", "two")}
    for tenant in (*folders, *folders):  # the second time all of them are there
        told = await look(manager, *folders.values(), tenant=tenant)
        assert {path for path, errors in told.items() if "ENOENT" not in errors} == {str(folders[tenant])}


@needs_it
async def test_what_is_granted_and_comes_or_is_replaced_later_is_there_for_the_next_worker(
    manager: PluginManager, attacker_meta: MetaFactory, place: Path
) -> None:
    later, file = place / "later", place / "file"
    file.write_text("before")
    meta = attacker_meta(granted={"read_paths": [str(later), str(file)]})
    await manager.load_plugin_async(meta)
    assert await errors_of(manager, later / "x", file) == ["ENOENT", ""]
    later.mkdir()
    (later / "x").write_text("x")
    (place / "new").write_text("after")
    (place / "new").rename(file)
    view = await manager.load_plugin_async(meta, instance_id="second")
    assert view.supervisor_pid == manager.get_instance("attacker").supervisor_pid
    assert await errors_of(manager, later / "x", file, instance="second") == ["", ""]
    seen = await manager.execute_plugin_async("second", action="attacker.identify", path=str(file))
    assert seen == file.stat().st_ino, "the new file, and not the one that was there when the supervisor came"


@needs_it
async def test_two_profiles_of_one_plugin_share_a_supervisor_and_no_view(
    manager: PluginManager, attacker_meta: MetaFactory, place: Path
) -> None:
    (place / "secret").write_text("s")
    await manager.load_plugin_async(attacker_meta())
    wider = attacker_meta(granted={"read_paths": [str(place / "secret")]})
    await manager.load_plugin_async(wider, instance_id="wider")
    assert await errors_of(manager, place / "secret") == ["ENOENT"]
    assert await errors_of(manager, place / "secret", instance="wider") == [""]


@needs_it
async def test_an_interpreter_behind_links_and_a_folder_behind_one_are_found(
    attacker_meta: MetaFactory, probe_python: Path, place: Path
) -> None:
    (place / "real").mkdir()
    (place / "data").symlink_to("real")
    (place / "environment").symlink_to(probe_python.parents[1])
    meta = attacker_meta()
    object.__setattr__(meta.manifest.install, "python_path", str(place / "environment/bin/python"))
    async with PluginManager(data_dir=place / "data", require=["bubblewrap"]) as manager:
        await manager.load_plugin_async(meta)
        assert (await errors_of(manager, Path("/etc/localtime"), Path("/lib"))) == ["", ""]


# -- to do without


async def test_a_plugin_cannot_ask_itself_out(manager: PluginManager, attacker_meta: MetaFactory) -> None:
    with pytest.raises(PluginConfigError, match="file_names: true") as caught:
        await manager.load_plugin_async(attacker_meta(isolation={"file_names": True}))
    assert caught.value.fields_invalid == ("isolation.file_names",)


async def test_who_is_granted_the_names_of_files_sees_them(
    manager: PluginManager, attacker_meta: MetaFactory, place: Path
) -> None:
    (place / "secret").write_text("s")
    view = await manager.load_plugin_async(attacker_meta(granted={"file_names": True}))
    assert "bubblewrap" not in view.layers
    assert await errors_of(manager, place / "secret") == ["EACCES"]


async def test_where_nobody_has_it_nothing_is_said_and_who_requires_it_is_refused(
    manager: PluginManager,
    attacker_meta: MetaFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    take_bubblewrap_away(monkeypatch)
    view = await manager.load_plugin_async(attacker_meta())
    assert "bubblewrap" not in view.layers
    assert caplog.records == []
    async with PluginManager(data_dir=tmp_path / "strict", require=["bubblewrap"]) as strict:
        with pytest.raises(PluginConfinementError, match="bubblewrap"):
            await strict.load_plugin_async(attacker_meta())


def test_only_a_folder_that_path_has_in_full_is_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(tmp_path, monkeypatch, "exit 0")
    assert bubblewrap_program() == str(tmp_path / "bwrap")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ".")
    assert bubblewrap_program() is None


# -- where it fails


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> str:
    """Put another program in the place of bubblewrap, and return its path."""
    program = folder / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.defpath}")
    return str(program)


async def test_where_it_fails_plugins_start_without_it_and_the_reason_is_told(
    manager: PluginManager,
    attacker_meta: MetaFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    program = pretend(tmp_path, monkeypatch, "echo 'bwrap: No permissions to create a new namespace' >&2; exit 1")
    reason = f"{program}: bwrap: No permissions to create a new namespace"
    with caplog.at_level(logging.WARNING):
        for name in ("attacker", "again"):
            assert "bubblewrap" not in (await manager.load_plugin_async(attacker_meta(), instance_id=name)).layers
    (told,) = caplog.records
    assert told.getMessage() == f"plugin attacker runs without the layer bubblewrap: {reason}"
    write_manifest(tmp_path / "manifests/attacker.json", attacker_meta().manifest)
    found = await diagnose(tmp_path, IsolationProfile())
    (layer,) = (layer for layer in found.layers if layer.name == "bubblewrap")
    assert (layer.held, layer.detail) == (False, reason)
    assert found.plugins[0].lacks == {"bubblewrap": reason}
    command = ["doctor", "--data-dir", str(tmp_path)]
    said = await asyncio.to_thread(CliRunner().invoke, app, command, catch_exceptions=False)
    assert f"lacks     bubblewrap ({reason})" in said.output
    async with PluginManager(data_dir=tmp_path / "strict", require=["bubblewrap"]) as strict:
        with pytest.raises(PluginConfinementError, match="bubblewrap"):
            await strict.load_plugin_async(attacker_meta())


@needs_it
async def test_a_failure_is_not_for_ever(
    manager: PluginManager, attacker_meta: MetaFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What failed for one view is tried again for the next, by the same supervisor."""
    real = bubblewrap_program()
    pretend(tmp_path, monkeypatch, "exit 1")
    assert "bubblewrap" not in (await manager.load_plugin_async(attacker_meta())).layers
    pretend(tmp_path, monkeypatch, f'exec {real} "$@"')
    wider = attacker_meta(granted={"read_paths": [str(tmp_path)]})
    assert "bubblewrap" in (await manager.load_plugin_async(wider, instance_id="next")).layers


@needs_it
@pytest.mark.parametrize("complication", ["no entering", "no entering, no namespaces"])
def test_where_what_it_makes_cannot_be_entered_plugins_start_without_it(
    probe_meta: MetaFactory, tmp_path: Path, complication: str
) -> None:
    write_manifest(tmp_path / "probe.json", probe_meta().manifest)
    host = [sys.executable, str(Path(__file__).parent / "plugins/doomed_host.py")]
    command = [*host, str(tmp_path / "probe.json"), str(tmp_path / "data"), complication]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        process.kill()
        _, errors = process.communicate()
    assert "bubblewrap" not in told["layers"]
    assert ("pid_namespace" in told["layers"]) is (namespaces.available() and "no namespaces" not in complication)
    assert "what it makes cannot be entered: setns" in errors


SOME_VIEW = View(mounts=(("/usr", READ, 0, 0), ("/proc", READ, 0, 0)), links=(), folders=())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "it ended with 3, and told of no process of its own"),
        ("echo nonsense > /proc/self/fd/$2", "it ended with 0, and told of no process of its own"),
        ("""echo '{"child-pid": []}' > /proc/self/fd/$2""", "told of no process of its own"),
        (
            """echo "{\\"child-pid\\": $$}" > /proc/self/fd/$2; cat /proc/self/fd/$4""",
            "it made no mount namespace of its own",
        ),
        ("""echo '{"child-pid": 999999999}' > /proc/self/fd/$2""", "No such file or directory: /proc/999999999/ns/mnt"),
        ("sleep 60", "it ended with -9"),
    ],
    ids=["fails", "nonsense", "no number", "itself", "nobody", "hangs"],
)
def test_a_program_that_does_something_else_is_not_taken_for_bubblewrap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    monkeypatch.setattr(bubblewrap, "_SECONDS", 5.0 if "sleep" not in script else 0.1)
    before = names_in(Path("/proc/self/fd"))
    with pytest.raises(OSError, match=r".*") as caught:
        bubblewrap.make(pretend(tmp_path, monkeypatch, script), SOME_VIEW)
    assert reason in bubblewrap.reason_of(caught.value)
    assert names_in(Path("/proc/self/fd")) == before, "no descriptor stays"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_program_that_cannot_be_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "bwrap").write_text("no program")
    with pytest.raises(PermissionError):
        bubblewrap.make(str(tmp_path / "bwrap"), SOME_VIEW)


@needs_it
def test_without_landlock_nothing_in_there_can_be_written_but_what_is_granted(place: Path) -> None:
    rules = file_rules(make_plan(IsolationProfile()), str(place))
    assert written_in(view_of(rules, read_only=True), "/usr/lib", "/", str(place)) == [False, False, True]


def written_in(view: View, *folders: str) -> list[bool]:
    """Enter the namespace of a view, in a process of its own, and try which folders can be written."""
    program = bubblewrap_program()
    assert program is not None
    namespace = bubblewrap.make(program, view)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            namespace.enter()
            os.write(write, json.dumps([os.access(folder, os.W_OK) for folder in folders]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    namespace.close()
    told: list[bool] = json.loads(os.read(read, 1000))
    os.close(read)
    os.close(write)
    return told


@needs_it
def test_only_so_many_namespaces_are_kept_and_one_that_was_given_up_is_made_anew(place: Path) -> None:
    program, before = bubblewrap_program(), names_in(Path("/proc/self/fd"))
    assert program is not None
    plan, kept = make_plan(IsolationProfile()), bubblewrap.MountNamespaces()
    made = []
    for number in [*range(40), 0, 39]:
        (place / str(number)).mkdir(exist_ok=True)
        namespace, reason = kept.get(program, view_of(file_rules(plan, str(place / str(number)))))
        assert namespace is not None, reason
        made.append(namespace.identity)
    assert len(names_in(Path("/proc/self/fd")) - before) <= 2 * 32
    assert made[-1] == made[39]
    kept.close()
    assert names_in(Path("/proc/self/fd")) == before


@pytest.mark.parametrize(("again_seconds", "tries"), [(60.0, 1), (0.0, 2)])
def test_what_failed_is_tried_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, again_seconds: float, tries: int
) -> None:
    program = pretend(tmp_path, monkeypatch, "echo once >> $0.log; exit 1")
    monkeypatch.setattr(bubblewrap, "_AGAIN_SECONDS", again_seconds)
    namespaces = bubblewrap.MountNamespaces()
    for _ in range(2):
        assert namespaces.get(program, SOME_VIEW)[0] is None
    assert (tmp_path / "bwrap.log").read_text() == "once\n" * tries


# -- begun before its supervisor is all there


def begun_for(order: dict[str, Any] | bytes | None) -> first_order.Begun | None:
    """Begin for an order that is waiting in a socket; it must still be waiting there afterwards."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        raw = order if isinstance(order, bytes) else json.dumps(order).encode()
        if order is not None:
            there.send(raw)
        begun = first_order.begin(here)
        assert order is None or here.recv(1 << 16) == raw
    return begun


@needs_it
def test_what_is_begun_for_the_first_worker_is_what_it_then_asks_for(place: Path) -> None:
    isolation = profile_to_json(IsolationProfile())
    begun = begun_for({"spawn": 1, "cwd": str(place), "isolation": isolation, "bubblewrap": bubblewrap_program()})
    assert begun is not None
    namespaces = bubblewrap.MountNamespaces(begun.making)
    made, reason = namespaces.get(begun.making.program, first_order.view(begun.views, begun.plan, str(place)))
    assert (made is not None, reason) == (True, "")
    namespaces.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def wait_until_nobody_shows(place: Path) -> None:
    """Wait until no process is left that was to make a view with this folder in it."""
    deadline = time.monotonic() + 20
    while any(str(place).encode() in command_of(process) for process in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline, "it waits for ever"
        time.sleep(0.005)


def command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@needs_it
def test_what_was_begun_and_is_not_asked_for_ends(place: Path) -> None:
    before = names_in(Path("/proc/self/fd"))
    program = bubblewrap_program()
    assert program is not None
    plan = make_plan(IsolationProfile())
    (place / "other").mkdir()
    for _ in range(10):
        begun = bubblewrap.Making(program, first_order.view(Views(), plan, str(place)))
        namespaces = bubblewrap.MountNamespaces(begun)
        assert namespaces.get(program, first_order.view(Views(), plan, str(place / "other")))[0] is not None
        namespaces.close()
        os.waitpid(-1, 0)  # the one that nobody has asked
    wait_until_nobody_shows(place)
    assert names_in(Path("/proc/self/fd")) == before


@needs_it
@pytest.mark.parametrize("released", [False, True])
def test_what_a_killed_supervisor_had_begun_ends_whenever_it_was_killed(place: Path, released: bool) -> None:
    program = bubblewrap_program()
    assert program is not None
    view = first_order.view(Views(), make_plan(IsolationProfile()), str(place))
    for number in range(20):
        child = os.fork()
        if child == 0:
            making = bubblewrap.Making(program, view)
            if released:
                making.give_up()
            for _ in range(20_000 * number):  # so that it is killed ever later
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    wait_until_nobody_shows(place)


@pytest.mark.parametrize(
    "order",
    [
        None,
        b"{",
        {"stats": 1},
        {"spawn": 1, "cwd": "/", "isolation": {}, "bubblewrap": None},
        {"spawn": 1, "cwd": "/", "isolation": {"network": 7}, "bubblewrap": "/bin/true"},
        {"spawn": 1, "cwd": "/", "isolation": {"file_names": True}, "bubblewrap": "/bin/true"},
        {"spawn": 1, "cwd": "/", "isolation": {}, "bubblewrap": "/not/there"},
    ],
    ids=["none yet", "no json", "another", "no bubblewrap", "wrong", "granted", "gone"],
)
def test_where_nothing_can_be_begun_nothing_is_lost(order: Any) -> None:
    assert begun_for(order) is None


def test_the_doctor_says_why_it_is_absent_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    take_bubblewrap_away(monkeypatch)
    assert shutil.which("bwrap") is None
    (layer,) = (layer for layer in machine_layers() if layer.name == "bubblewrap")
    assert (layer.held, layer.detail) == (
        False,
        "no folder of PATH has a program bwrap; the package is called bubblewrap",
    )
