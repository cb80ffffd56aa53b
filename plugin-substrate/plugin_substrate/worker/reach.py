"""Which files a worker needs to run at all: interpreter, environment, system libraries, what the system tells everyone.

Only what is listed can be read once Landlock is in force; the plugin's own folder and what it was granted come on top.
"""

from __future__ import annotations

import sys
from pathlib import Path

_OURS = Path(__file__).resolve().parent
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
_PROGRAMS = ("/bin", "/sbin")
_CONFIGURATION = (
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone", "/etc/mime.types",
    "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/fonts", "/etc/alternatives", "/etc/os-release",
    "/etc/ssl/openssl.cnf", "/var/cache/fontconfig",
)  # fmt: skip
_OF_NETWORK = (
    "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/services", "/etc/protocols",
    "/etc/ssl", "/etc/ca-certificates", "/etc/pki", "/etc/crypto-policies",
)  # fmt: skip
_OF_KERNEL = (
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems",
    "/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/osrelease", "/proc/sys/kernel/random",
    "/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/kernel/mm/transparent_hugepage",
    # how much of the machine a container may use: who asks takes a file that is there for one that can be read
    "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us",
    "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)  # fmt: skip

#: Devices without a state of their own.
PLAIN_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def readable_paths(*, network: bool) -> tuple[str, ...]:
    """Return what any plugin of this interpreter may read; paths that do not exist are among them."""
    ours = [str(_OURS), *(str(_OURS.parent / name) for name in ("interface.py", "errors.py"))]
    return (*ours, *_SYSTEM, *_PROGRAMS, *_CONFIGURATION, *_OF_KERNEL, *(_OF_NETWORK if network else ()))


def environment_paths() -> tuple[str, ...]:
    """Return the folders of this interpreter and of its virtual environment.

    What their packages link to elsewhere is not among them: a package could name any folder there.
    """
    prefixes = {sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix}
    environment = Path(sys.executable).absolute().parent.parent
    if (environment / "pyvenv.cfg").is_file():
        prefixes.add(str(environment))
    return tuple(sorted(prefixes - {"/"}))
