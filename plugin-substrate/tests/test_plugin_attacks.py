"""A plugin that tries to get out of its worker, and honest ones that must not notice: with bubblewrap, and without.

All of it is tried as root and as an ordinary user, see `test_plugin_as_ordinary_user`.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from other_users import interpreter_for_everybody
from plugin_substrate import (
    CallContext,
    IsolationProfile,
    PluginError,
    PluginManager,
    PluginMeta,
    PluginResourceError,
    WorkerOOMError,
    control_group,
)
from plugin_substrate.testing import PluginWorkers
from plugin_substrate.testing.leftovers import descendants
from plugin_substrate.worker import namespaces
from plugin_substrate.worker.landlock import kernel_abi
from plugin_substrate.worker.own_user import uid_of

MetaFactory = Callable[..., PluginMeta]
Attack = Callable[..., Any]

HERE = Path(__file__).parent
REFUSED = {"EPERM", "EACCES"}
HIDDEN = {"ENOENT", "ENOTDIR"}  # of what the test knows to be there

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers tested here are Linux's")


@pytest.fixture(autouse=True)
def bubblewrap(with_and_without_bubblewrap: bool) -> bool:
    """Whether bubblewrap is there: every test of this file runs with it and without it."""
    return with_and_without_bubblewrap


@pytest.fixture
def attacker_meta(probe_meta: MetaFactory) -> MetaFactory:
    """Make the description of the attacker."""
    return lambda **options: probe_meta("Attacker", module="attacker", name="attacker", **options)


@pytest.fixture(params=[False, True], ids=["imported", "copied"])
async def attack(manager: PluginManager, attacker_meta: MetaFactory, request: pytest.FixtureRequest) -> Attack:
    """Have the attacker try something, with no more rights than any plugin has, in either kind of worker."""
    await manager.load_plugin_async(attacker_meta(preload=request.param))
    return lambda action, **arguments: tried(manager, action, **arguments)


@pytest.fixture
async def forking(tmp_path: Path, attacker_meta: MetaFactory) -> AsyncIterator[PluginManager]:
    """A manager with the attacker loaded, which may have 8 processes and 256 MiB."""
    profile = IsolationProfile(processes=8, memory_bytes=256 << 20)
    async with PluginManager(data_dir=tmp_path / "forking", grace_seconds=0.3, isolation=profile) as owner:
        await owner.load_plugin_async(attacker_meta())
        yield owner


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder of the host's with a precious file in it, which must be as it was afterwards."""
    folder = tmp_path / "outside"
    folder.mkdir()
    precious = folder / "precious"
    precious.write_text("precious")
    precious.chmod(0o600)
    yield folder
    assert [entry.name for entry in folder.iterdir()] == ["precious"]
    assert (precious.read_text(), precious.stat().st_mode & 0o7777) == ("precious", 0o600)


async def tried(manager: PluginManager, action: str, *, tenant: str = "", **arguments: Any) -> Any:
    async with asyncio.timeout(60):
        call = CallContext("c", tenant_id=tenant)
        return await manager.execute_plugin_async("attacker", action=f"attacker.{action}", call=call, **arguments)


def all_refused(outcomes: dict[str, str], *, hidden: bool = False) -> bool:
    """Whether each was refused, or with ``hidden`` was told that what is there is not there."""
    return bool(outcomes) and set(outcomes.values()) <= (REFUSED | HIDDEN if hidden else REFUSED)


# -- files


async def test_a_plugin_reads_nothing_of_the_host_of_its_neighbours_or_of_other_tenants(
    manager: PluginManager, attack: Attack, outside: Path, tmp_path: Path, bubblewrap: bool
) -> None:
    neighbour = tmp_path / "data/data/neighbour"
    neighbour.mkdir(parents=True)
    (neighbour / "secret").write_text("secret")
    await tried(manager, "honest_library_use", tenant="a-tenant")
    others = list((tmp_path / "data/data/attacker").rglob("own.db"))
    assert others, "the other tenant has a file"
    pid, supervisor = os.getpid(), manager.get_instance("attacker").supervisor_pid
    private = [f"/proc/{who}/{what}" for who in (pid, supervisor) for what in ("environ", "mem", "maps", "fd")]
    paths = [outside / "precious", outside, neighbour, neighbour / "secret", *others, Path.home(), "/etc/shadow"]
    paths += [tmp_path, tempfile.gettempdir(), "/var", "/dev", "/sys/fs"]
    assert all_refused(await attack("read", paths=[str(path) for path in paths]), hidden=bubblewrap)
    paths = [f"/proc/self/{name}" for name in ("net/tcp", "net/unix", "task", "mem")]
    assert all_refused(await attack("read", paths=["/proc", *paths, *private]))


async def test_a_plugin_learns_nothing_of_files_that_it_may_not_open(
    manager: PluginManager, attack: Attack, outside: Path, tmp_path: Path, bubblewrap: bool
) -> None:
    """What is there and what is not are answered alike, through every way to them; without the layer they are not."""
    await tried(manager, "honest_library_use", tenant="a-tenant")
    (other,) = (tmp_path / "data/data/attacker").glob("t-*")
    hosts = [f"/proc/{pid}/root" for pid in (os.getpid(), manager.get_instance("attacker").supervisor_pid)]
    around = ["", "/proc/self/root", "/proc/self/cwd/../../../../../../../..", *hosts]
    there = [outside / "precious", outside, other, other / "tmp", Path("/etc/shadow"), Path("/var/log"), Path("/home")]
    ways = [f"{way}{path}" for way in around for path in there if path.exists()]
    found = await attack("look", paths=ways)
    invented = await attack("look", paths=[f"{way}-not-there" for way in ways])
    told = {way: answers for way, answers in found.items() if "" in answers}
    if bubblewrap:
        assert told == {}
        assert found == {way.removesuffix("-not-there"): answers for way, answers in invented.items()}
    else:
        assert str(outside / "precious") in told, "which is what the layer is for"


async def test_a_plugin_inherits_an_empty_input_its_log_and_its_socket(
    manager: PluginManager, attacker_meta: MetaFactory, outside: Path
) -> None:
    """The host has a file, a directory and a socket open that could be inherited."""
    with (outside / "precious").open() as file, socket.socket() as listening:
        directory = os.open(outside, os.O_RDONLY)
        for descriptor in (file.fileno(), directory, listening.fileno()):
            os.set_inheritable(descriptor, True)
        await manager.load_plugin_async(attacker_meta())
        assert await tried(manager, "inherited") == {"0": "device", "1": "pipe", "2": "pipe", "3": "socket"}
        os.close(directory)


async def test_a_plugin_changes_nothing_outside_its_own_folder(attack: Attack, outside: Path, bubblewrap: bool) -> None:
    outcomes = await attack("change", outside=str(outside))
    exceptions = {"hardlink in": "EXDEV", "hardlink out": "EXDEV", "rename in": "EXDEV", "rename out": "EXDEV"}
    for name, error in outcomes.items():
        assert error in REFUSED or error == exceptions.get(name) or (bubblewrap and error in HIDDEN), (name, error)


async def test_a_change_of_mode_is_answered_as_done_and_not_done(attack: Attack, outside: Path) -> None:
    assert await attack("chmod", path=str(outside / "precious")) == ""


async def test_a_change_of_times_is_answered_as_done_and_not_done(attack: Attack, outside: Path) -> None:
    before = (outside / "precious").stat()
    assert await attack("set_times", path=str(outside / "precious")) == ""
    assert (outside / "precious").stat() == before


async def test_a_plugin_neither_holds_up_who_opens_a_file_nor_hears_of_it(attack: Attack) -> None:
    assert all_refused(await attack("hold_up"))


async def test_a_plugin_makes_no_set_id_file_not_even_in_its_own_folder(attack: Attack, tmp_path: Path) -> None:
    assert all_refused(await attack("set_id"))
    made = [path for path in (tmp_path / "data/data").rglob("*") if path.lstat().st_mode & 0o6000]
    assert made == []


async def test_granted_paths_are_reached_and_nothing_beside_them(
    manager: PluginManager, attacker_meta: MetaFactory, tmp_path: Path, bubblewrap: bool
) -> None:
    for name in ("granted", "granted too"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    await manager.load_plugin_async(attacker_meta(granted={"read_paths": [str(tmp_path / "granted")]}))
    paths = [str(tmp_path / name / "file") for name in ("granted", "granted too")]
    assert await tried(manager, "read", paths=paths) == {paths[0]: "", paths[1]: "ENOENT" if bubblewrap else "EACCES"}


async def test_a_granted_device_can_be_used_and_no_other(
    manager: PluginManager, attacker_meta: MetaFactory, bubblewrap: bool
) -> None:
    """As drivers of GPUs are used: opened for both, and spoken to by ioctl, which this one does not understand."""
    await manager.load_plugin_async(attacker_meta(granted={"devices": ["/dev/full"]}))
    assert await tried(manager, "device", path="/dev/full") == {"open": "", "write": "ENOSPC", "ioctl": "ENOTTY"}
    refusal = {"ENOENT"} if bubblewrap else REFUSED
    assert (await tried(manager, "device", path="/dev/ptmx"))["open"] in refusal


async def test_a_folder_of_models_is_read_by_every_plugin_and_written_by_none(
    probe_meta: MetaFactory, attacker_meta: MetaFactory, outside: Path, tmp_path: Path
) -> None:
    async with PluginManager(data_dir=tmp_path / "data", models_dir=outside) as manager:
        for meta in (probe_meta(), attacker_meta()):
            await manager.load_plugin_async(meta)
        found = await manager.execute_plugin_async("probe", action="probe.surroundings")
        assert found["environment"]["CJM_MODELS_DIR"] == str(outside)
        assert await tried(manager, "read", paths=[str(outside / "precious")]) == {str(outside / "precious"): ""}
        assert (await tried(manager, "change", outside=str(outside)))["append"] in REFUSED


# -- the network


async def test_a_plugin_makes_no_socket_of_any_family(attack: Attack) -> None:
    assert await attack("sockets") == []


async def test_a_plugin_sends_nothing_to_who_listens_on_this_machine(attack: Attack, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "s"))
        (tmp_path / "s").chmod(0o777)
        listening.setblocking(False)
        outcomes = await attack("datagrams", address=str(tmp_path / "s"))
        assert {kind for kind, error in outcomes.items() if not error} == {"5"}, (
            "which goes to the other end of the pair"
        )
        with pytest.raises(BlockingIOError):
            listening.recv(1)


async def test_a_plugin_with_the_network_has_ip_and_nothing_else(
    manager: PluginManager, attacker_meta: MetaFactory, tmp_path: Path
) -> None:
    await manager.load_plugin_async(attacker_meta(granted={"network": True}))
    made = await tried(manager, "sockets")
    assert [socket.AF_INET, socket.SOCK_STREAM] in made
    assert {family for family, _ in made} <= {socket.AF_INET, socket.AF_INET6}
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert await tried(manager, "connect", port=server.getsockname()[1]) == ""
    with socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        assert await tried(manager, "unix", address=str(tmp_path / "s")) == "EAFNOSUPPORT"


# -- processes, signals and the kernel


async def test_a_plugin_starts_no_process(attack: Attack) -> None:
    outcomes = await attack("processes")
    assert outcomes.pop("clone3") == "ENOSYS"
    assert all_refused(outcomes)


async def test_a_plugin_can_neither_signal_nor_hinder_nor_look_into_another_process(
    manager: PluginManager, attack: Attack
) -> None:
    for pid in (os.getpid(), manager.get_instance("attacker").supervisor_pid):
        outcomes = await attack("signals", pid=pid)
        assert all_refused(outcomes), outcomes
    bystander = await asyncio.create_subprocess_exec("sleep", "60")
    assert all_refused(await attack("signals", pid=bystander.pid))
    assert bystander.returncode is None
    bystander.kill()
    await bystander.wait()


NEVER = (
    "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp io_uring_setup bpf perf_event_open userfaultfd keyctl"
    " add_key shmget semget msgget mq_open mount umount2 pivot_root unshare setns open_by_handle_at name_to_handle_at"
    " init_module kexec_load reboot syslog swapon settimeofday sethostname personality fanotify_init quotactl acct iopl"
    " modify_ldt fork vfork execve execveat socket chroot fsopen move_mount memfd_create memfd_secret"
    " landlock_create_ruleset io_setup inotify_init inotify_init1 inotify_add_watch"
)


async def test_what_no_plugin_needs_of_the_kernel_is_refused_by_number(attack: Attack) -> None:
    outcomes = await attack("system_calls", names=NEVER.split())
    assert {name: error for name, error in outcomes.items() if error != "EPERM"} == {}


async def test_a_plugin_holds_no_privilege_and_cannot_change_how_it_ends(
    manager: PluginManager, attack: Attack
) -> None:
    lines = status_of(manager.get_instance("attacker").pid).splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")] == [0, 0, 0, 0]
    if os.geteuid() == 0:
        assert int(status["CapBnd"], 16) == 0, "nor could a program give it any"
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert await attack("privileges") == {"die with parent": "EPERM", "dumpable": "EPERM"}


# -- taking too much


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
async def test_a_memory_bomb_ends_its_worker_and_says_so(
    manager: PluginManager, attacker_meta: MetaFactory, shared: bool
) -> None:
    await manager.load_plugin_async(attacker_meta(granted={"memory_bytes": 256 << 20}))
    with pytest.raises(WorkerOOMError, match="268435456") as caught:
        await tried(manager, "memory_bomb", shared=shared)
    assert caught.value.resource_shortfall is not None
    assert (caught.value.resource_shortfall.resource, caught.value.outcome_known) == ("memory", False)
    assert await tried(manager, "honest_memory", size=1 << 20) == 1 << 20


async def test_processes_that_take_too_much_together_end_with_their_worker(forking: PluginManager) -> None:
    with pytest.raises(WorkerOOMError):
        await tried(forking, "memory_of_children", count=4, size=100 << 20)


async def test_a_fork_bomb_ends_with_its_worker(forking: PluginManager) -> None:
    with pytest.raises(PluginResourceError, match=r"of 8 granted \(processes\)"):
        await tried(forking, "fork_bomb")
    assert await tried(forking, "honest_child") == "42"
    await forking.unload_all_async()
    left = [process for process in descendants(os.getpid()) if process.alive]
    assert left == []


async def test_a_thread_bomb_ends_its_worker(manager: PluginManager, attack: Attack) -> None:
    with pytest.raises(PluginResourceError, match=r"of 1024 granted \(threads\)") as caught:
        await attack("thread_bomb")
    assert not caught.value.outcome_known
    assert await attack("honest_threads", count=50)


async def test_what_the_kernel_keeps_for_a_plugin_is_bounded(attack: Attack) -> None:
    assert await attack("full_buffers") < 4 << 20
    assert await attack("timers", most=5000) <= 1024


async def test_a_file_ends_at_its_limit(manager: PluginManager, attacker_meta: MetaFactory) -> None:
    await manager.load_plugin_async(attacker_meta(granted={"file_bytes": 3 << 20}))
    assert await tried(manager, "fill_disk") == ("EFBIG", 3 << 20)


async def test_files_that_take_too_much_together_end_their_worker(
    manager: PluginManager, attacker_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(attacker_meta(granted={"disk_bytes": 8 << 20}))
    with pytest.raises(PluginResourceError, match=r"of 8388608 granted \(disk\)") as caught:
        await tried(manager, "fill_disk_with_files", size=128 << 10)
    assert caught.value.resource_shortfall is not None
    assert not caught.value.outcome_known


async def test_too_many_files_end_their_worker_though_they_are_empty(
    manager: PluginManager, attacker_meta: MetaFactory
) -> None:
    await manager.load_plugin_async(attacker_meta(granted={"disk_bytes": 8 << 20}))
    with pytest.raises(PluginResourceError, match=r"of 8388608 granted \(disk\)"):
        await tried(manager, "fill_disk_with_names")


async def test_files_in_a_folder_where_nobody_can_look_end_their_worker(attack: Attack) -> None:
    with pytest.raises(PluginResourceError, match="hidden_folders"):
        await attack("fill_disk_far_below")


async def test_nobody_writes_on_after_the_plugin_was_unloaded(manager: PluginManager, attack: Attack) -> None:
    await attack("late_writer")
    process = manager.get_instance("attacker").pid
    assert process is not None
    await manager.unload_plugin_async("attacker")
    assert not any(left.pid == process and left.alive for left in descendants(os.getpid()))


SHADOWED = """
import json, queue, plugin_substrate.errors, plugin_substrate.worker.frames
from plugin_substrate.interface import PluginInterface


class Shadowed(PluginInterface):
    name, version = "shadowed", "1"

    def initialize(self, config):
        pass

    def execute(self, *args, **kwargs):
        return [module.__file__ for module in (json, queue, plugin_substrate.errors, plugin_substrate.worker.frames)]

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return {}
"""


async def test_modules_named_like_ours_or_the_standard_librarys_shadow_nothing(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "plugin_substrate").mkdir(parents=True)
    for name in ("json.py", "queue.py", "socket.py", "plugin_substrate/__init__.py", "plugin_substrate/errors.py"):
        (place / name).write_text("raise RuntimeError('taken for another')")
    (place / "shadowed.py").write_text(SHADOWED)
    async with PluginWorkers(tmp_path / "data") as workers:
        worker = await workers.start_async("shadowed:Shadowed", place=place)
        files = (await worker.call_async()).value
    assert not any(file.startswith(str(place)) for file in files)


# -- honest plugins


async def test_an_honest_plugin_has_fifty_threads_and_a_hundred_megabytes(attack: Attack) -> None:
    assert await attack("honest_threads", count=50)
    assert await attack("honest_memory", size=100 << 20) == 100 << 20


async def test_an_honest_plugin_uses_ordinary_libraries(attack: Attack) -> None:
    assert await attack("honest_library_use") == {
        "asyncio": "slept",
        "random": 8,
        "cpu_count": True,
        "copied": "x",
        "time": True,
        "machine": True,
        "home": True,
        "touched": True,
    }


async def test_an_honest_plugin_runs_a_program_that_it_was_granted(forking: PluginManager) -> None:
    layers = forking.get_instance("attacker").layers
    kept_by = {"pid_namespace": namespaces.available(), "cgroup": control_group.usable()}
    assert {name: name in layers for name in kept_by} == kept_by
    assert ("descendants_swept" in layers) is not any(kept_by.values())
    assert await tried(forking, "honest_child") == "42"


async def test_ended_processes_that_nobody_waited_for_are_not_counted(forking: PluginManager) -> None:
    assert await tried(forking, "honest_zombies", count=20) == 20


async def test_all_layers_of_this_machine_are_reported(
    manager: PluginManager, attack: Attack, bubblewrap: bool
) -> None:
    layers = manager.get_instance("attacker").layers
    assert ("bubblewrap" in layers) is bubblewrap
    assert {"no_new_privs", "capabilities_dropped", "seccomp", f"landlock:{kernel_abi()}"} <= set(layers)
    with pytest.raises(PluginError):
        await attack("no_such_action")


# -- as somebody else


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can enter, as those that pytest makes are not."""
    with tempfile.TemporaryDirectory(prefix="plugin-attacks-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a plugin a user of its own")
@pytest.mark.parametrize("processes", [0, 4])
async def test_a_plugin_of_roots_has_a_user_of_its_own_where_that_user_can_reach_everything(
    attacker_meta: MetaFactory, open_folder: Path, processes: int
) -> None:
    meta = with_interpreter(attacker_meta(), environment_for_everybody(open_folder / "environment"))
    profile = IsolationProfile(processes=processes)
    data_dir = open_folder / "data"
    async with PluginManager(data_dir=data_dir, require=["own_uid"], isolation=profile) as manager:
        view = await manager.load_plugin_async(meta)
        (uid,) = (int(layer.partition(":")[2]) for layer in view.layers if layer.startswith("own_uid:"))
        assert uid == uid_of("attacker") != uid_of("another")
        assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in status_of(view.pid)
        assert (await tried(manager, "honest_library_use"))["copied"] == "x"
        assert data_dir.stat().st_mode & 0o777 == 0o711, "its user passes through, and sees nothing on its way"
        worker = os.pidfd_open(view.pid or 0)
        os.kill(view.supervisor_pid or 0, signal.SIGKILL)
        assert select.select([worker], [], [], 20)[0], "its end is still tied to its supervisor's"
        os.close(worker)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a plugin a user of its own")
async def test_where_its_user_cannot_reach_its_folder_the_layer_is_absent_and_no_permission_is_changed(
    attacker_meta: MetaFactory, open_folder: Path
) -> None:
    meta = with_interpreter(attacker_meta(), environment_for_everybody(open_folder / "environment"))
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700)
    async with PluginManager(data_dir=closed) as manager:
        view = await manager.load_plugin_async(meta)
        assert not [layer for layer in view.layers if layer.startswith("own_uid")]
        assert (await tried(manager, "honest_library_use"))["copied"] == "x"
    assert closed.stat().st_mode & 0o777 == 0o700


def with_interpreter(meta: PluginMeta, python: Path) -> PluginMeta:
    install = replace(meta.manifest.install, python_path=str(python))
    return replace(meta, manifest=replace(meta.manifest, install=install))


def environment_for_everybody(folder: Path) -> Path:
    """Make an environment with the attacker in it that another user can run; skip the test where there is no way."""
    python = interpreter_for_everybody()
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    (site_packages / "attacker.pth").write_text(str(HERE / "plugins"))
    return folder / "bin" / "python"


def status_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/status").read_text()
