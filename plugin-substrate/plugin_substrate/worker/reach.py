"""Which files a worker needs to run at all: interpreter, environment, system libraries, what the system tells everyone.

Only what is listed can be read once Landlock is in force; the plugin's own folder and what it was granted come on top.
"""

from __future__ import annotations

import os
import sys

_WORKER = os.path.dirname(os.path.realpath(__file__))
#: The files of ours that a worker runs.
_BESIDE = ("interface.py", "errors.py", "records.py", "file_plugin.py", "validation.py")
OUR_FILES = (_WORKER, *(os.path.join(os.path.dirname(_WORKER), name) for name in _BESIDE))

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
# Of itself, and nothing of the network: whom this machine speaks with, and who listens here, is told below there too.
_OF_ITSELF = tuple(
    f"/proc/self/{name}"
    for name in (
        "auxv", "cgroup", "cmdline", "comm", "environ", "fd", "fdinfo", "io", "limits", "maps", "mountinfo", "mounts",
        "numa_maps", "oom_score", "oom_score_adj", "sched", "schedstat", "smaps", "smaps_rollup", "stat", "statm",
        "status",
    )
)  # fmt: skip
_OF_KERNEL = (
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/filesystems",
    "/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/osrelease", "/proc/sys/kernel/random",
    "/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/kernel/mm/transparent_hugepage",
)  # fmt: skip
# Control groups: where each controller's tree is mounted, by its name in /proc/self/cgroup, and what it limits.
_CONTROL_GROUPS = "/sys/fs/cgroup"
_LIMITS = {
    "": ("cpu.max", "memory.max", "memory.high"),
    "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
    "cpu,cpuacct": ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
    "memory": ("memory.limit_in_bytes",),
}

#: Devices without a state of their own.
PLAIN_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def readable_paths(*, network: bool) -> tuple[str, ...]:
    """Return what any plugin of this interpreter may read; paths that do not exist are among them."""
    limits = limit_files(_membership())
    return (
        *OUR_FILES,
        *_SYSTEM,
        *_PROGRAMS,
        *_CONFIGURATION,
        *_OF_ITSELF,
        *_OF_KERNEL,
        *limits,
        *(_OF_NETWORK if network else ()),
    )


def limit_files(membership: str) -> tuple[str, ...]:
    """Return the files that say how much of the machine the control groups of ``/proc/self/cgroup`` may use.

    Libraries size their pools and caches by them, and take a file that is there for one that can be read. Of other
    groups, and of who is in them, nothing is told.
    """
    files: list[str] = []
    for line in membership.splitlines():
        _, controller, group = line.split(":", 2)
        if controller not in _LIMITS or ".." in group.split("/"):  # a group outside of what this namespace shows
            continue
        tree = os.path.normpath(os.path.join(_CONTROL_GROUPS, controller))
        folders = [os.path.normpath(os.path.join(tree, group.lstrip("/")))]
        while folders[-1] != tree:
            folders.append(os.path.dirname(folders[-1]))
        files += [os.path.join(folder, name) for folder in folders for name in _LIMITS[controller]]
    return tuple(files)


def environment_paths() -> tuple[str, ...]:
    """Return the folders of this interpreter and of its virtual environment.

    What their packages link to elsewhere is not among them: a package could name any folder there.
    """
    prefixes = {sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix}
    environment = os.path.dirname(os.path.dirname(os.path.abspath(sys.executable)))
    if os.path.isfile(os.path.join(environment, "pyvenv.cfg")):
        prefixes.add(environment)
    return tuple(sorted(prefixes - {"/"}))


def _membership() -> str:
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:  # no control groups here
        return ""
