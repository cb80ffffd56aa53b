"""What a process knows about its own memory. From outside, one that is not dumpable cannot be asked."""

from __future__ import annotations

import os
import resource
import sys

_REPORT = "/proc/self/smaps_rollup"
_PRIVATE = (b"Private_Clean:", b"Private_Dirty:", b"Private_Hugetlb:")


class MemoryReport:
    """Reads the kernel's report of this process; made before the process gives up reading files."""

    def __init__(self) -> None:
        try:
            self._descriptor = os.open(_REPORT, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no Linux, or a kernel without it
            self._descriptor = -1

    def read(self) -> dict[str, int]:
        """Return bytes: ``uss`` (private to this process) and ``rss`` where the kernel tells them, and ``peak_rss``."""
        figures = {"peak_rss": peak_bytes(resource.getrusage(resource.RUSAGE_SELF))}
        if self._descriptor < 0:
            return figures
        sizes = {"uss": 0, "rss": 0}
        for line in os.pread(self._descriptor, 1 << 14, 0).splitlines():
            if line.startswith(_PRIVATE):
                sizes["uss"] += _bytes(line)
            elif line.startswith(b"Rss:"):
                sizes["rss"] = _bytes(line)
        return {**figures, **sizes}


def peak_bytes(usage: resource.struct_rusage) -> int:
    """Return the largest resident size in bytes; only macOS counts in these."""
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


def _bytes(line: bytes) -> int:
    return int(line.split()[1]) * 1024
