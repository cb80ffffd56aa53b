"""A system call filter (seccomp(2)), assembled by hand for x86-64 and aarch64; on other machines there is none.

It refuses what a plugin has no business with, whatever rights its user has, and what Landlock cannot see: sockets,
processes, tracing, changing other processes of the same user, file modes and owners. It cannot be taken off again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterable, Mapping

from plugin_substrate.records import record
from plugin_substrate.worker.kernel import PR_SET_DUMPABLE, PR_SET_PDEATHSIG, PR_SET_SECCOMP, prctl, system_call
from plugin_substrate.worker.landlock import SIGNAL_ABI
from plugin_substrate.worker.syscall_numbers import HIGHEST_KNOWN, NUMBERS, SECCOMP

_MODE_FILTER = 2
_SET_FILTER, _GET_ACTION_AVAILABLE = 1, 2  # operations of seccomp(2)
_NEW_LISTENER = 1 << 3

# Classic BPF: operation codes, and where the kernel puts what in the data it shows to a filter.
_LOAD, _EQUAL, _GREATER, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_ALLOW, _ASK, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x7FC00000, 0x80000000, 0x00050000
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_ALL_BITS = 0xFFFFFFFF

_CLONE_THREAD = 0x00010000
_CLONE_NEW_NAMESPACES = 0x7E020000
_OF_A_FORK = 0x01200000 | 0xFF  # CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID, and the signal that tells of its end
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCK_STREAM, _SOCK_DGRAM, _SOCK_SEQPACKET = 1, 2, 5
_SOCK_FLAGS = (0, 0o4000, 0o2000000, 0o2004000)
_SET_ID_BITS = 0o6000
_O_CREATES = 0o100 | 0o20000000  # O_CREAT, __O_TMPFILE
_F_SETOWN, _F_SETOWN_EX = 8, 15
_F_SETLEASE, _F_NOTIFY = 1024, 1026  # to hold up whoever opens a file; to hear what others do in a folder
_SOL_SOCKET, _BUFFER_SIZES = 1, (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF, and those that break their limits
_PRIO_PROCESS, _IOPRIO_WHO_PROCESS = 0, 1  # not a group, and not all of a user's
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_NEVER = (  # noqa: SIM905 - as a list it would be a page
    # looking into and changing other processes
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp get_robust_list move_pages"
    " migrate_pages perf_event_open"
    # new ways into the kernel that go round this filter, or are known for their faults
    " io_uring_setup io_uring_enter io_uring_register bpf userfaultfd modify_ldt personality"
    # memory that no process is seen to hold, and what the whole user or system has only so many of
    " memfd_create memfd_secret landlock_create_ruleset io_setup"
    # tells what others do in folders that may not even be listed
    " inotify_init inotify_init1 inotify_add_watch"
    # memory and messages that other processes of the same user can reach by name
    " shmget shmat shmctl semget semctl semop semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink"
    " add_key request_key keyctl"
    # the system itself
    " mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick open_tree open_tree_attr move_mount mount_setattr"
    " unshare setns init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff syslog"
    " quotactl quotactl_fd acct settimeofday clock_settime adjtimex clock_adjtime sethostname setdomainname iopl ioperm"
    " name_to_handle_at open_by_handle_at fanotify_init fanotify_mark lookup_dcookie nfsservctl vhangup uselib"
    # owners and attributes of files, which no rule of Landlock covers
    " chown lchown fchown fchownat setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr"
    " removexattrat file_setattr"
).split()  # fmt: skip
_NOT_THERE = ("clone3", "openat2")  # their arguments lie in memory; the C library falls back to what can be checked
_NEW_PROCESS = ("fork", "vfork", "execve", "execveat")
_OF_OTHERS = ("sched_setaffinity", "sched_setparam", "sched_setscheduler", "sched_setattr", "prlimit64")

#: RLIMIT_LOCKS, which the kernel keeps and no longer uses: supervisors are marked by it, see `plugin_substrate.sweep`.
MARK_LIMIT = 10

#: Stands for the process that will be filtered, where a program is made before there is one; no process has it.
ANY_PID = 0x7E5A_1C3B
_ANY_PID_BYTES = struct.pack("=I", ANY_PID)
_INSTRUCTION = struct.Struct("=HBBI")

_Instruction = tuple[int, int, int, int]
_Block = list[_Instruction]


@record(kw_only=True)
class FilterRules:
    """What a filter leaves open. ``pid`` is the process that is filtered, ``landlock_abi`` what else confines it.

    A program for `ANY_PID` is completed when it is installed.

    With ``asks_to_fork`` a plain fork, and tying one's end to the parent's, are what the holder of the filter's
    descriptor says; not together with ``processes``.
    """

    network: bool
    processes: bool
    pid: int
    landlock_abi: int
    asks_to_fork: bool = False


def supported() -> bool:
    """Whether this machine's architecture has a filter."""
    return os.uname().machine in _AUDIT_ARCHITECTURE


def prepare(rules: FilterRules) -> bytes:
    """Return the program for this machine; empty where there is no filter for the architecture."""
    if not supported():
        return b""
    program = assemble(os.uname().machine, rules)
    numbers = [value for _, _, _, value in _INSTRUCTION.iter_unpack(program)]
    if program.count(_ANY_PID_BYTES) != numbers.count(ANY_PID):
        raise AssertionError("the place of a process id cannot be told from the rest of the program")
    return program


def install(program: bytes, pid: int) -> None:
    """Filter this process and its children from now on. Needs no_new_privs. The kernel's refusal is an OSError."""
    _, described = _of_process(program, pid)
    prctl(PR_SET_SECCOMP, _MODE_FILTER, described)


def can_ask() -> bool:
    """Whether this machine's filters can put a system call to another process."""
    machine = os.uname().machine
    if machine not in SECCOMP or not supported():
        return False
    try:
        system_call(SECCOMP[machine], _GET_ACTION_AVAILABLE, 0, struct.pack("=I", _ASK))
    except OSError:
        return False
    return True


def install_asking(program: bytes, pid: int) -> int:
    """Like `install`, of rules with ``asks_to_fork``; returns the descriptor that questions arrive on (`fork_gate`).

    When nobody holds that any more, all that is asked is refused.
    """
    _, described = _of_process(program, pid)
    return system_call(SECCOMP[os.uname().machine], _SET_FILTER, _NEW_LISTENER, described)


def _of_process(program: bytes, pid: int) -> tuple[object, bytes]:
    """Return struct sock_fprog (the number of instructions, padding, their address), and what must outlive its use."""
    own = program.replace(_ANY_PID_BYTES, struct.pack("=I", pid))
    held = ctypes.create_string_buffer(own, len(own))
    return held, struct.pack("@HP", len(own) // _INSTRUCTION.size, ctypes.addressof(held))


def assemble(machine: str, rules: FilterRules) -> bytes:
    """Return the filter's program for an architecture, as the kernel takes it."""
    numbers = NUMBERS[machine]
    program: _Block = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _AUDIT_ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        *_when(_GREATER, HIGHEST_KNOWN, _refuse(errno.ENOSYS)),  # x32 calls have a high bit set
    ]
    for name, block in _blocks(rules).items():
        if name in numbers:  # each architecture lacks some
            program += _when(_EQUAL, numbers[name], block)
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)


def _blocks(rules: FilterRules) -> Mapping[str, _Block]:
    """Return what happens at which call; each block ends with a verdict."""
    blocks = dict.fromkeys(_NEVER, _refuse())
    blocks |= dict.fromkeys(_NOT_THERE, _refuse(errno.ENOSYS))
    blocks |= dict.fromkeys(_OF_OTHERS, _only(0, (0, rules.pid)))
    for name, a_process in {"setpriority": _PRIO_PROCESS, "ioprio_set": _IOPRIO_WHO_PROCESS}.items():
        blocks[name] = [_argument(0), *_when(_EQUAL, a_process, _only(1, (0, rules.pid))), *_refuse()]
    blocks["prlimit64"] = _unless_it_sets(MARK_LIMIT, blocks["prlimit64"])
    blocks["setrlimit"] = _not_any(0, (MARK_LIMIT,))
    blocks["prctl"] = _not_any(0, (PR_SET_PDEATHSIG, PR_SET_DUMPABLE))
    blocks["fcntl"] = _not_any(1, (_F_SETOWN, _F_SETOWN_EX, _F_SETLEASE, _F_NOTIFY))
    blocks["ioctl"] = _not_any(1, (_TIOCSTI, _TIOCLINUX))
    blocks |= _file_modes()
    blocks |= _file_times()
    blocks |= _processes(rules)
    blocks |= _network(rules.network)
    if rules.asks_to_fork:
        blocks |= _forks_on_request(rules)
    if rules.landlock_abi < 3:
        blocks["truncate"] = _refuse()
    return blocks


def _unless_it_sets(limit: int, otherwise: _Block) -> _Block:
    """Refuse a new value for a limit."""
    return [_argument(1), *_when(_EQUAL, limit, _if_not_null(2, _refuse())), *otherwise]


def _file_modes() -> dict[str, _Block]:
    """Set-id bits are refused; every other change of a mode is answered as done, and not carried out.

    Landlock does not cover modes, so a plugin could change those of every file of its user. Inside its own folder they
    mean nothing: nobody else can enter, and nothing there can be executed.
    """
    mode_of_existing = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2}
    blocks = {
        name: [_argument(at), *_when(_ANY_BIT, _SET_ID_BITS, _refuse()), *_refuse(0)]
        for name, at in mode_of_existing.items()
    }
    for name, at in {"creat": 1, "mknod": 1, "mknodat": 2}.items():
        blocks[name] = [_argument(at), *_when(_ANY_BIT, _SET_ID_BITS, _refuse()), *_pass()]
    for name, flags in {"open": 1, "openat": 2}.items():
        with_mode = [_argument(flags + 1), *_when(_ANY_BIT, _SET_ID_BITS, _refuse()), *_pass()]
        blocks[name] = [_argument(flags), *_when(_ANY_BIT, _O_CREATES, with_mode), *_pass()]
    return blocks


def _file_times() -> dict[str, _Block]:
    """Times that are given are answered as set, and are not, as they could be set of every file of its user.

    To touch a file by name is refused, as Python then opens it, which makes it; to touch one that is open is allowed.
    """
    by_name_or_open = [*_if_not_null(2, _refuse(0)), *_if_not_null(1, _refuse()), *_pass()]
    by_name = [*_if_not_null(1, _refuse(0)), *_refuse()]
    return {"utimensat": by_name_or_open, "futimesat": by_name_or_open, "utime": by_name, "utimes": by_name}


def _processes(rules: FilterRules) -> dict[str, _Block]:
    if rules.processes:
        blocks = {"clone": [_argument(0), *_when(_ANY_BIT, _CLONE_NEW_NAMESPACES, _refuse()), *_pass()]}
        signals_hold = rules.landlock_abi >= SIGNAL_ABI
        return blocks if signals_hold else blocks | {"pidfd_send_signal": _refuse(), "tkill": _refuse()}
    blocks = dict.fromkeys(_NEW_PROCESS, _refuse())
    blocks["clone"] = [_argument(0), *_when(_ANY_BIT, _CLONE_THREAD, _clone_of_thread()), *_refuse()]
    blocks |= dict.fromkeys(("tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"), _only(0, (rules.pid,)))
    blocks["kill"] = _only(0, (0, rules.pid))  # 0 is its own process group, where nobody else is
    blocks["pidfd_send_signal"] = _refuse()
    if rules.landlock_abi < SIGNAL_ABI:
        blocks["tkill"] = _refuse()  # it names a thread, which may be anyone's
    return blocks


def _forks_on_request(rules: FilterRules) -> dict[str, _Block]:
    """Ask for what the C library's fork does and for nothing else; processes may signal themselves.

    A filter cannot name the processes that are yet to come. What they may signal is bounded by Landlock where it knows
    signals, and is else nobody, not even themselves.
    """
    others = [_argument(0), *_when(_ANY_BIT, ~_OF_A_FORK & 0xFFFFFFFF, _refuse()), *_ask()]
    tie = [_argument(1), *_when(_EQUAL, signal.SIGKILL, _ask()), *_refuse()]
    blocks = {
        "clone": [_argument(0), *_when(_ANY_BIT, _CLONE_THREAD, _clone_of_thread()), *others],
        "prctl": [_argument(0), *_when(_EQUAL, PR_SET_PDEATHSIG, tie), *_not_any(0, (PR_SET_DUMPABLE,))],
    }
    signals = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
    return blocks | dict.fromkeys(signals, _pass() if rules.landlock_abi >= SIGNAL_ABI else _only(0, (0,)))


def _clone_of_thread() -> _Block:
    return [*_when(_ANY_BIT, _CLONE_NEW_NAMESPACES, _refuse()), *_pass()]


def _network(allowed: bool) -> dict[str, _Block]:
    """Socket pairs connect a process with itself; everything else is refused, or is IP with the usual two types.

    Datagrams of a pair could be sent to anybody who listens on this machine. Buffers keep the size that they have: what
    is in them is no process's memory.
    """
    size = [_argument(2), *(i for option in _BUFFER_SIZES for i in _when(_EQUAL, option, _refuse(0)))]
    blocks = {
        "socketpair": _of_types((_AF_UNIX,), (_SOCK_STREAM, _SOCK_SEQPACKET), _refuse()),
        "setsockopt": [_argument(1), *_when(_EQUAL, _SOL_SOCKET, [*size, *_pass()]), *_pass()],
    }
    if not allowed:
        return blocks | {"socket": _refuse()}
    ip = _of_types((_AF_INET, _AF_INET6), (_SOCK_STREAM, _SOCK_DGRAM), _refuse(errno.EAFNOSUPPORT))
    return blocks | {"socket": ip}


def _of_types(families: Iterable[int], kinds: Iterable[int], otherwise: _Block) -> _Block:
    types = [kind | flags for kind in kinds for flags in _SOCK_FLAGS]
    return [_argument(0), *_pass_if_then(families, [_argument(1), *_pass_if(types), *_refuse()]), *otherwise]


# -- pieces of programs


def _argument(position: int) -> _Instruction:
    """Load the low half of an argument; those that are checked are ints or small flags to the kernel."""
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * position)


def _upper_half(position: int) -> _Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * position + 4)


def _ask() -> _Block:
    return [(_RETURN, 0, 0, _ASK)]


def _pass() -> _Block:
    return [(_RETURN, 0, 0, _ALLOW)]


def _refuse(number: int = errno.EPERM) -> _Block:
    return [(_RETURN, 0, 0, _ERRNO | number)]


def _if_not_null(position: int, block: _Block) -> _Block:
    """Go through the block if an address is given; it is a whole pointer, so both halves count."""
    halves = (_argument(position), _upper_half(position))
    return [instruction for half in halves for instruction in (half, *_when(_ANY_BIT, _ALL_BITS, block))]


def _when(test: int, value: int, block: _Block) -> _Block:
    """Go through the block if the test holds of what was loaded, else past it."""
    return [(test, 0, len(block), value), *block]


def _pass_if(values: Iterable[int]) -> _Block:
    return [instruction for value in values for instruction in _when(_EQUAL, value, _pass())]


def _pass_if_then(values: Iterable[int], block: _Block) -> _Block:
    return [instruction for value in values for instruction in _when(_EQUAL, value, block)]


def _only(position: int, values: Iterable[int]) -> _Block:
    return [_argument(position), *_pass_if(values), *_refuse()]


def _not_any(position: int, values: Iterable[int]) -> _Block:
    refused = [instruction for value in values for instruction in _when(_EQUAL, value, _refuse())]
    return [_argument(position), *refused, *_pass()]
