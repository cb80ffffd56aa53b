"""The filter's program, judged by a small machine that runs it as the kernel would, for both architectures; and
Landlock, asked for as older kernels know it."""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate.worker import kernel, landlock, seccomp
from plugin_substrate.worker.landlock import Access
from plugin_substrate.worker.seccomp import FilterRules, assemble
from plugin_substrate.worker.syscall_numbers import HIGHEST_KNOWN, NUMBERS

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, ASK, KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
PID = 4711
STRICT = FilterRules(network=False, processes=False, pid=PID, landlock_abi=7)


def run(program: bytes, number: int, arguments: tuple[int, ...] = (), architecture: int = 0xC000003E) -> int:
    """Return what a filter answers to a call."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *(argument & (2**64 - 1) for argument in padded))
    instructions = list(struct.iter_unpack("=HBBI", program))
    place, accumulator = 0, 0
    tests: dict[int, Callable[[int, int], bool]] = {
        0x15: lambda a, k: a == k,
        0x25: lambda a, k: a > k,
        0x35: lambda a, k: a >= k,
        0x45: lambda a, k: bool(a & k),
    }
    while True:
        code, yes, no, value = instructions[place]
        place += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        else:
            place += yes if tests[code](accumulator, value) else no


def answer(machine: str, rules: FilterRules, name: str, *arguments: int) -> str:
    """Return the errno's name a call gets, ``done`` for one that is answered without being made, else empty.

    ``asked`` is one that the holder of the filter decides.
    """
    verdict = run(assemble(machine, rules), NUMBERS[machine][name], arguments, ARCHITECTURES[machine])
    if verdict == ALLOW:
        return ""
    if verdict == ASK:
        return "asked"
    return errno.errorcode[verdict & 0xFFFF] if verdict & 0xFFFF else "done"


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
def test_the_filter_answers_as_it_should_on_either_architecture(machine: str) -> None:
    expected = {
        ("socket", 2, 1): "EPERM",
        ("socketpair", 1, 1): "",
        ("socketpair", 1, 5 | 0o2004000): "",
        ("socketpair", 1, 2): "EPERM",  # datagrams of a pair can be sent to anybody
        ("socketpair", 1, 3): "EPERM",  # which is the same
        ("socketpair", 2, 1): "EPERM",
        ("setsockopt", 3, 1, 7): "done",
        ("setsockopt", 3, 1, 33): "done",
        ("setsockopt", 3, 1, 2): "",
        ("setsockopt", 3, 6, 7): "",
        ("utimensat", -100, 0x7F00, 0x7F00, 0): "done",
        ("utimensat", -100, 0x7F00, 1 << 32, 0): "done",
        ("utimensat", -100, 1 << 32, 0, 0): "EPERM",
        ("utimensat", 3, 0, 0, 0): "",
        ("utimensat", 3, 0, 0x7F00, 0): "done",
        ("fcntl", 3, 1024, 0): "EPERM",
        ("fcntl", 3, 1026, 4): "EPERM",
        ("fcntl", 3, 3): "",
        ("inotify_add_watch",): "EPERM",
        ("memfd_create",): "EPERM",
        ("clone", 0x3D0F00): "",  # what a new thread asks for
        ("clone", 17): "EPERM",
        ("clone3",): "ENOSYS",
        ("execve",): "EPERM",
        ("kill", PID, 9): "",
        ("kill", 0, 9): "",
        ("kill", 1, 9): "EPERM",
        ("kill", -1, 9): "EPERM",
        ("tgkill", PID, PID, 6): "",
        ("tgkill", PID + 1, PID, 6): "EPERM",
        ("prctl", 1, 0): "EPERM",
        ("prctl", 15): "",
        ("prlimit64", 0): "",
        ("prlimit64", 1): "EPERM",
        ("prlimit64", 0, 10, 0): "",  # reading the limit that supervisors are marked by
        ("prlimit64", 0, 10, 0x7F00): "EPERM",
        ("prlimit64", 0, 10, 1 << 32): "EPERM",
        ("prlimit64", 0, 7, 0x7F00): "",
        ("setrlimit", 10, 0x7F00): "EPERM",
        ("setrlimit", 7, 0x7F00): "",
        ("setpriority", 0, 0, 5): "",
        ("setpriority", 2, 0, 5): "EPERM",
        ("fchmodat", 0, 0, 0o755): "done",
        ("fchmodat", 0, 0, 0o4755): "EPERM",
        ("openat", 0, 0, 0o100, 0o644): "",
        ("openat", 0, 0, 0o100, 0o4644): "EPERM",
        ("openat", 0, 0, 0, 0o4644): "",  # without creating, the mode is whatever the register held
        ("ptrace",): "EPERM",
        ("io_uring_setup",): "EPERM",
        ("ioctl", 0, 0x5412): "EPERM",
        ("ioctl", 0, 0x5401): "",
    }
    got = {call: answer(machine, STRICT, str(call[0]), *map(int, call[1:])) for call in expected}
    assert got == expected


def test_the_older_calls_for_times_of_files_are_answered_alike() -> None:
    calls = [("utime", 0x7F00, 1), ("utime", 0x7F00, 0), ("utimes", 0x7F00, 1), ("futimesat", -100, 0x7F00, 0)]
    got = [answer("x86_64", STRICT, str(name), *map(int, arguments)) for name, *arguments in calls]
    assert got == ["done", "EPERM", "done", "EPERM"]


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
def test_each_grant_opens_its_own_door_and_no_other(machine: str) -> None:
    network = FilterRules(network=True, processes=False, pid=PID, landlock_abi=7)
    assert [answer(machine, network, "socket", family, 1) for family in (2, 10)] == ["", ""]
    assert answer(machine, network, "socket", 2, 2 | 0o2004000) == ""
    assert {answer(machine, network, "socket", family, 1) for family in (1, 16, 17, 38, 40)} == {"EAFNOSUPPORT"}
    assert answer(machine, network, "socket", 2, 3) != ""  # raw
    assert answer(machine, network, "execve") == "EPERM"
    processes = FilterRules(network=False, processes=True, pid=PID, landlock_abi=7)
    assert [answer(machine, processes, name, 17) for name in ("clone", "execve", "kill")] == ["", "", ""]
    assert answer(machine, processes, "clone", 0x10000011) == "EPERM"  # a user namespace
    assert answer(machine, processes, "socket", 2, 1) == "EPERM"


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
def test_without_landlocks_newer_rights_the_filter_holds_more(machine: str) -> None:
    for abi, call in ((2, "truncate"), (5, "tkill")):
        old = FilterRules(network=False, processes=False, pid=PID, landlock_abi=abi)
        assert (answer(machine, old, call), answer(machine, STRICT, call)) == ("EPERM", "")
    old = FilterRules(network=False, processes=True, pid=PID, landlock_abi=5)
    assert answer(machine, old, "pidfd_send_signal") == "EPERM"


@given(st.integers(-(2**31), 2**31 - 1), st.lists(st.integers(0, 2**64 - 1), max_size=6))
def test_any_call_gets_a_verdict_and_a_new_foreign_or_disguised_one_never_passes(
    number: int, arguments: list[int]
) -> None:
    program = assemble("x86_64", STRICT)
    verdict = run(program, number, tuple(arguments))
    assert verdict == ALLOW or verdict & 0xFFFF0000 == 0x00050000
    if not 0 <= number <= HIGHEST_KNOWN:
        assert verdict == 0x00050000 | errno.ENOSYS
    assert run(program, number, tuple(arguments), 0x40000003) == KILL  # a 32-bit call of the same process


@pytest.mark.skipif(not landlock.kernel_abi(), reason="this kernel has no Landlock")
@pytest.mark.parametrize("abi", range(1, landlock.kernel_abi() + 1))
def test_landlock_holds_as_much_as_an_older_kernel_knows(abi: int, tmp_path: Path) -> None:
    own, outside = tmp_path / "own", tmp_path / "outside"
    for folder in (own, outside):
        folder.mkdir()
        (folder / "file").write_text("x")
    report, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            landlock.restrict([(str(own), Access.CHANGE), (str(tmp_path / "none"), Access.READ)], abi, tcp=False)
            answers = [_fails(outside / "file", "r"), _fails(outside / "file", "w"), _fails(own / "new", "w")]
            os.write(write_end, bytes(answers))
        finally:
            os._exit(0)
    os.close(write_end)
    assert list(os.read(report, 10)) == [True, True, False]
    os.close(report)
    os.waitpid(child, 0)


def _fails(path: Path, mode: str) -> bool:
    try:
        path.open(mode).close()
    except PermissionError:
        return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the table is compared with Linux's own")
def test_the_numbers_are_those_of_the_systems_headers() -> None:
    """Where the headers are installed: they are the kernel's own tables."""
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    for machine, header in headers.items():
        if not Path(header).is_file():
            continue
        lines = [line.split() for line in Path(header).read_text().splitlines() if line.startswith("#define __NR")]
        known = {
            line[1].replace("__NR3264_", "__NR_")[5:]: line[2] for line in lines if line[2:] and line[2].isdecimal()
        }
        differing = {name for name, number in NUMBERS[machine].items() if known.get(name, str(number)) != str(number)}
        assert differing == set()


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
def test_a_template_asks_for_a_plain_fork_and_to_end_with_its_parent_and_for_nothing_else(machine: str) -> None:
    sigchld, set_tid, clear_tid, of_a_thread = 17, 0x01000000, 0x00200000, 0x003D0F00
    rules = FilterRules(network=False, processes=False, pid=PID, landlock_abi=7, asks_to_fork=True)
    assert answer(machine, rules, "clone", set_tid | clear_tid | sigchld) == "asked"
    assert answer(machine, rules, "clone", of_a_thread) == ""
    for flag in (0x100, 0x4000, 0x8000, 0x1000, 0x400, 0x20000000, 0x10000000):  # memory, vfork, parent, pidfd, ...
        assert answer(machine, rules, "clone", flag | sigchld) == "EPERM"
    assert answer(machine, rules, "prctl", kernel.PR_SET_PDEATHSIG, 9) == "asked"
    for other in (0, 15):
        assert answer(machine, rules, "prctl", kernel.PR_SET_PDEATHSIG, other) == "EPERM"
    assert answer(machine, rules, "prctl", kernel.PR_SET_DUMPABLE, 1) == "EPERM"
    assert answer(machine, rules, "execve") == "EPERM"
    assert answer(machine, rules, "socket", 2, 1) == "EPERM"
    assert answer(machine, rules, "kill", PID + 1, 0) == "", "it ends at Landlock"
    older = FilterRules(network=False, processes=False, pid=PID, landlock_abi=5, asks_to_fork=True)
    assert answer(machine, older, "kill", PID, 0) == "EPERM"
    assert answer(machine, older, "kill", 0, 0) == ""


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
def test_what_a_copy_may_do_is_what_a_worker_may(machine: str) -> None:
    """The stricter answer of its template's filter and its own holds."""
    theirs = FilterRules(network=False, processes=False, pid=PID - 1, landlock_abi=7, asks_to_fork=True)
    for name, arguments in {
        "clone": (17,), "kill": (PID + 1,), "tgkill": (PID + 1,), "prctl": (kernel.PR_SET_PDEATHSIG, 9),
        "ptrace": (), "socket": (2,), "execve": (), "unshare": (),
    }.items():  # fmt: skip
        assert answer(machine, STRICT, name, *arguments) == "EPERM"
        assert answer(machine, theirs, name, *arguments) in ("EPERM", "asked", "")


def test_a_program_made_before_its_process_is_the_one_made_for_it() -> None:
    for rules in (STRICT, FilterRules(network=True, processes=True, pid=PID, landlock_abi=5)):
        early = seccomp.prepare(replace(rules, pid=seccomp.ANY_PID))
        assert early.replace(struct.pack("=I", seccomp.ANY_PID), struct.pack("=I", PID)) == seccomp.prepare(rules)
