"""A plugin that tries to get out: each action is one attempt, and its answer says how it was refused.

It runs in a worker, never in the tests' process. What an attempt would break is made by the test for that purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import resource
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

from plugin_substrate.interface import PluginInterface, plugin_action

# Every attempt below goes to the kernel by number, so that no library stands between it and the answer.
NUMBERS = {
    "x86_64": {
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438, "kcmp": 312,
        "io_uring_setup": 425, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "keyctl": 250, "add_key": 248,
        "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "mount": 165, "umount2": 166, "pivot_root": 155,
        "unshare": 272, "setns": 308, "open_by_handle_at": 304, "name_to_handle_at": 303, "init_module": 175,
        "kexec_load": 246, "reboot": 169, "syslog": 103, "swapon": 167, "settimeofday": 164, "sethostname": 170,
        "personality": 135, "fanotify_init": 300, "quotactl": 179, "acct": 163, "iopl": 172, "modify_ldt": 154,
        "fork": 57, "vfork": 58, "clone": 56, "clone3": 435, "execve": 59, "execveat": 322, "socket": 41, "chroot": 161,
        "rt_sigqueueinfo": 129, "pidfd_send_signal": 424, "pidfd_open": 434, "tgkill": 234, "openat2": 437,
        "setpriority": 141, "prlimit64": 302, "sched_setaffinity": 203, "fsopen": 430, "move_mount": 429,
        "memfd_create": 319, "memfd_secret": 447, "landlock_create_ruleset": 444, "io_setup": 206,
        "inotify_init": 253, "inotify_init1": 294, "inotify_add_watch": 254, "timer_create": 222,
    },
    "aarch64": {
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "pidfd_getfd": 438, "kcmp": 272,
        "io_uring_setup": 425, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "keyctl": 219, "add_key": 217,
        "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "mount": 40, "umount2": 39, "pivot_root": 41,
        "unshare": 97, "setns": 268, "open_by_handle_at": 265, "name_to_handle_at": 264, "init_module": 105,
        "kexec_load": 104, "reboot": 142, "syslog": 116, "swapon": 224, "settimeofday": 170, "sethostname": 161,
        "personality": 92, "fanotify_init": 262, "quotactl": 60, "acct": 89,
        "clone": 220, "clone3": 435, "execve": 221, "execveat": 281, "socket": 198, "chroot": 51,
        "rt_sigqueueinfo": 138, "pidfd_send_signal": 424, "pidfd_open": 434, "tgkill": 131, "openat2": 437,
        "setpriority": 140, "prlimit64": 261, "sched_setaffinity": 122, "fsopen": 430, "move_mount": 429,
        "memfd_create": 279, "memfd_secret": 447, "landlock_create_ruleset": 444, "io_setup": 0,
        "inotify_init1": 26, "inotify_add_watch": 27, "timer_create": 107,
    },
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def system_call(name, *arguments):
    """Call by number; the errno's name when it is refused."""
    number = NUMBERS[platform.machine()][name]
    if _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)) >= 0:
        return ""
    return errno.errorcode[ctypes.get_errno()]


def refused(function, *arguments, **options):
    """Return the name of the errno that a function fails with, empty when it does not fail."""
    try:
        result = function(*arguments, **options)
    except OSError as error:
        return errno.errorcode[error.errno]
    if hasattr(result, "close"):
        result.close()
    return ""


class Attacker(PluginInterface):
    name = "attacker"
    version = "1.0"

    def initialize(self, config):
        self.config = config

    def get_config_schema(self):
        return {}

    def get_current_config(self):
        return self.config

    def execute(self, action, **arguments):
        return self.run_action(action, **arguments)

    @plugin_action("attacker.read")
    def read(self, paths):
        return {path: refused(self._list_or_read, Path(path)) for path in paths}

    @plugin_action("attacker.look")
    def look(self, paths):
        """Ask what can be asked of a file without opening it: for each path the errors, empty where there is none."""
        questions = (os.stat, os.lstat, os.statvfs, os.readlink, os.listxattr, self._access)
        return {path: [refused(question, path) for question in questions] for path in paths}

    @plugin_action("attacker.identify")
    def identify(self, path):
        return Path(path).stat().st_ino

    @staticmethod
    def _access(path):
        """``os.access`` does not tell why not."""
        if _libc.access(os.fsencode(path), os.F_OK):
            raise OSError(ctypes.get_errno(), path)

    @plugin_action("attacker.device")
    def device(self, path):
        try:
            device = os.open(path, os.O_RDWR)
        except OSError as error:
            return {"open": errno.errorcode[error.errno]}
        outcome = {
            "open": "",
            "write": refused(os.write, device, b"x"),
            "ioctl": refused(fcntl.ioctl, device, termios.TCGETS),
        }
        os.close(device)
        return outcome

    @staticmethod
    def _list_or_read(path):
        if path.is_dir():
            list(path.iterdir())
        else:
            path.read_bytes()

    @plugin_action("attacker.inherited")
    def inherited(self):
        """What is open though this plugin did not open it, by its kind."""
        kinds = {}
        for descriptor in range(4096):
            with contextlib.suppress(OSError):
                kinds[str(descriptor)] = stat.S_IFMT(os.fstat(descriptor).st_mode)
        names = {stat.S_IFCHR: "device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        return {descriptor: names.get(kind, oct(kind)) for descriptor, kind in kinds.items()}

    @plugin_action("attacker.change")
    def change(self, outside):
        """Try everything that would change a folder that is not its own; it holds a file ``precious``."""
        outside, own = Path(outside), self.data_dir
        precious = outside / "precious"
        (own / "mine").write_text("mine")
        (own / "way out").symlink_to(outside)
        (own / "way in").symlink_to(precious)
        return {
            "create": refused(Path.write_text, outside / "new", "x"),
            "append": refused(open, precious, "a"),
            "truncate": refused(os.truncate, precious, 0),
            "truncate while opening": refused(os.open, precious, os.O_RDONLY | os.O_TRUNC),
            "unlink": refused(precious.unlink),
            "mkdir": refused((outside / "folder").mkdir),
            "symlink": refused((outside / "link").symlink_to, own),
            "hardlink in": refused(os.link, precious, own / "stolen"),
            "hardlink out": refused(os.link, own / "mine", outside / "planted"),
            "rename in": refused(os.rename, precious, own / "moved"),
            "rename out": refused(os.rename, own / "mine", outside / "moved"),
            "write through a link": refused(Path.write_text, own / "way in", "x"),
            "create through a link": refused(Path.write_text, own / "way out" / "new", "x"),
            "chown": refused(os.chown, precious, os.getuid(), os.getgid()),
            "attribute": refused(os.setxattr, precious, "user.x", b"x"),
            "touch": refused(os.utime, precious),
            "set-id bits": refused(os.chmod, precious, 0o4777),
            "pipe": refused(os.mkfifo, outside / "pipe"),
            "device": refused(os.mknod, own / "device", 0o20666, os.makedev(1, 1)),
        }

    @plugin_action("attacker.chmod")
    def chmod(self, path):
        """Open a file to everybody; what it is told is not what happened."""
        return refused(os.chmod, path, 0o777)

    @plugin_action("attacker.set_times")
    def set_times(self, path):
        """Give a file another age; what it is told is not what happened."""
        return refused(os.utime, path, (1, 1))

    @plugin_action("attacker.hold_up")
    def hold_up(self):
        """Have the kernel hold up whoever opens a file of the interpreter, or tell what is done in its folder."""
        descriptors = [os.open(path, os.O_RDONLY) for path in (os.__file__, Path(os.__file__).parent)]
        try:
            return {
                "read lease": refused(fcntl.fcntl, descriptors[0], 1024, fcntl.F_RDLCK),
                "write lease": refused(fcntl.fcntl, descriptors[0], 1024, fcntl.F_WRLCK),
                "notify": refused(fcntl.fcntl, descriptors[1], 1026, 0x80000004),
            }
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    @plugin_action("attacker.set_id")
    def set_id(self):
        own = self.data_dir
        (own / "tool").write_text("#!/bin/sh\n")
        return {
            "chmod": refused(os.chmod, own / "tool", 0o4755),
            "fchmod": refused(self._fchmod, own / "tool"),
            "open": refused(os.open, own / "tool2", os.O_CREAT | os.O_WRONLY, 0o6755),
            "mknod": refused(os.mknod, own / "tool3", 0o106755),
        }

    @staticmethod
    def _fchmod(path):
        with path.open() as file:
            os.fchmod(file.fileno(), 0o2755)

    @plugin_action("attacker.sockets")
    def sockets(self):
        """Return the families and types that a socket can be made of."""
        open_ones = []
        for family in range(46):
            for kind in range(1, 11):
                if not refused(socket.socket, family, kind):
                    open_ones.append([family, kind])
        first, second = socket.socketpair()
        first.sendall(b"x")
        assert second.recv(1) == b"x"
        return open_ones

    @plugin_action("attacker.connect")
    def connect(self, port):
        return refused(socket.create_connection, ("127.0.0.1", port), 5)

    @plugin_action("attacker.unix")
    def unix(self, address):
        def connect():
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(address)

        return refused(connect)

    @plugin_action("attacker.datagrams")
    def datagrams(self, address):
        """Send to somebody who listens on this machine, through one end of a pair."""

        def send(kind):
            first, _ = socket.socketpair(socket.AF_UNIX, kind)
            first.sendto(b"x", address)

        return {str(kind): refused(send, kind) for kind in range(1, 11) if kind != socket.SOCK_STREAM}

    @plugin_action("attacker.full_buffers")
    def full_buffers(self):
        """Fill a pair whose buffer was asked to be large, and return how much is in it."""
        sender, receiver = socket.socketpair()
        for option in (socket.SO_SNDBUF, 32):  # SO_SNDBUFFORCE
            sender.setsockopt(socket.SOL_SOCKET, option, 1 << 30)
        sender.setblocking(False)
        held = 0
        with contextlib.suppress(BlockingIOError), receiver:
            while True:
                held += sender.send(bytes(1 << 16))
        return held

    @plugin_action("attacker.timers")
    def timers(self, most):
        """Take timers, of which a user has only so many, until there are no more."""
        made = ctypes.create_string_buffer(8)
        for number in range(most):
            if _libc.syscall(ctypes.c_long(NUMBERS[platform.machine()]["timer_create"]), 1, 0, made) < 0:
                return number
        return most

    @plugin_action("attacker.thread_bomb")
    def thread_bomb(self):
        threading.stack_size(1 << 15)
        never = threading.Event()
        while True:
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=never.wait, daemon=True).start()

    @plugin_action("attacker.system_calls")
    def system_calls(self, names):
        return {name: system_call(name, 0, 0, 0, 0, 0) for name in names if name in NUMBERS[platform.machine()]}

    @plugin_action("attacker.processes")
    def processes(self):
        return {
            "fork": refused(os.fork),
            "subprocess": refused(subprocess.run, ["/bin/true"], check=False),
            "posix_spawn": refused(os.posix_spawn, "/bin/true", ["true"], {}),
            "exec": refused(os.execv, "/bin/true", ["true"]),
            "clone": system_call("clone", signal.SIGCHLD, 0, 0, 0, 0),
            "clone3": system_call("clone3", 0, 0),
        }

    @plugin_action("attacker.signals")
    def signals(self, pid):
        """Try to signal, slow down, limit and look into another process of this user."""
        descriptor = os.pidfd_open(pid)
        try:
            return {
                "kill": refused(os.kill, pid, 0),
                "kill all": refused(os.kill, -1, 0),
                "kill group": refused(os.killpg, os.getpgid(pid), 0),
                "tgkill": system_call("tgkill", pid, pid, 0),
                "pidfd": refused(signal.pidfd_send_signal, descriptor, 0),
                "queue": system_call("rt_sigqueueinfo", pid, 0, 0),
                "owner": refused(fcntl.fcntl, 0, fcntl.F_SETOWN, pid),
                "priority": refused(os.setpriority, os.PRIO_PROCESS, pid, 19),
                "priority of the user": refused(os.setpriority, os.PRIO_USER, 0, 19),
                "limits": refused(resource.prlimit, pid, resource.RLIMIT_NOFILE, (8, 8)),
                "affinity": refused(os.sched_setaffinity, pid, {0}),
                "ptrace": system_call("ptrace", 16, pid, 0, 0),
                "memory": system_call("process_vm_readv", pid, 0, 0, 0, 0, 0),
                "descriptors": system_call("pidfd_getfd", descriptor, 0, 0),
            }
        finally:
            os.close(descriptor)

    @plugin_action("attacker.privileges")
    def privileges(self):
        return {
            "die with parent": refused(self._live_on),
            "dumpable": refused(self._be_dumpable),
        }

    @staticmethod
    def _live_on():
        if _libc.prctl(1, 0, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG")

    @staticmethod
    def _be_dumpable():
        if _libc.prctl(4, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_SET_DUMPABLE")

    @plugin_action("attacker.memory_bomb")
    def memory_bomb(self, shared):
        """Take memory until it ends, in private or in shared pages."""
        self.report_progress(0.5, "lit")
        held = []
        while True:
            held.append(mmap.mmap(-1, 16 << 20) if shared else bytearray(16 << 20))
            for offset in range(0, 16 << 20, mmap.PAGESIZE):
                held[-1][offset] = 1

    @plugin_action("attacker.memory_of_children")
    def memory_of_children(self, count, size):
        """Have children that take so much each, none of them too much alone."""
        for _ in range(count):
            if os.fork() == 0:
                held = bytearray(size)
                for offset in range(0, size, mmap.PAGESIZE):
                    held[offset] = 1
                time.sleep(1000)
        time.sleep(1000)

    @plugin_action("attacker.fork_bomb")
    def fork_bomb(self):
        self.report_progress(0.5, "lit")
        while True:
            with_children = refused(os.fork)
            if with_children:
                time.sleep(0.001)

    @plugin_action("attacker.fill_disk")
    def fill_disk(self):
        try:
            with (self.data_dir / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 20))
        except OSError as error:
            return errno.errorcode[error.errno], (self.data_dir / "filler").stat().st_size

    @plugin_action("attacker.fill_disk_with_files")
    def fill_disk_with_files(self, size):
        number = 0
        while True:
            (self.data_dir / f"part-{number}").write_bytes(bytes(size))
            number += 1
            time.sleep(0.01)

    @plugin_action("attacker.fill_disk_with_names")
    def fill_disk_with_names(self):
        number = 0
        while True:
            (self.data_dir / f"empty-{number}").touch()
            number += 1

    @plugin_action("attacker.fill_disk_far_below")
    def fill_disk_far_below(self):
        """Go down until no path leads there any more."""
        os.chdir(self.data_dir)
        for _ in range(30):
            os.mkdir("d" * 200)  # noqa: PTH102 - a path would be too long
            os.chdir("d" * 200)
        time.sleep(1000)

    @plugin_action("attacker.late_writer")
    def late_writer(self):
        """Return, and write on."""
        file = (self.data_dir / "late").open("ab", buffering=0)

        def write():
            while True:
                file.write(b"x")
                time.sleep(0.001)

        threading.Thread(target=write, daemon=True).start()
        return str(self.data_dir / "late")

    # -- what honest plugins do

    @plugin_action("attacker.honest_threads")
    def honest_threads(self, count):
        together = threading.Barrier(count)
        threads = [threading.Thread(target=together.wait, args=(60,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return not together.broken

    @plugin_action("attacker.honest_memory")
    def honest_memory(self, size):
        held = bytearray(size)
        for offset in range(0, size, mmap.PAGESIZE):
            held[offset] = 1
        return len(held)

    @plugin_action("attacker.honest_child")
    def honest_child(self):
        done = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or done.stderr

    @plugin_action("attacker.honest_zombies")
    def honest_zombies(self, count):
        """End children without waiting for them, and stay long enough to be looked at more than once."""
        for _ in range(count):
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # one that is only about to end lives
        time.sleep(0.3)
        return count

    @plugin_action("attacker.honest_library_use")
    def honest_library_use(self):
        """Use what ordinary code uses without thinking about it."""
        own = self.data_dir
        with sqlite3.connect(own / "own.db") as database:
            database.execute("create table t (x)")
            database.execute("insert into t values (1)")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "file").write_text("x")
            shutil.copy2(Path(folder) / "file", own / "copied")
            shutil.copytree(folder, own / "tree")
        (own / "touched").touch()
        (own / "touched").touch()
        return {
            "asyncio": asyncio.run(asyncio.sleep(0, "slept")),
            "random": len(os.urandom(8)),
            "cpu_count": os.cpu_count() is not None,
            "copied": (own / "copied").read_text(),
            "time": bool(time.localtime().tm_zone),
            "machine": platform.machine() != "",
            "home": Path.home() == own,
            "touched": (own / "touched").exists(),
        }
