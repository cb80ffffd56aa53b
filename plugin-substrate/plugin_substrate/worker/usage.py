"""What this process has used: figures that nobody outside can read of a process that is not dumpable."""

from __future__ import annotations

import resource
import sys
import time

_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kibibytes here
_UNIQUE = ("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")


class CallMeter:
    """Measures the process over one call. Calls beside it count too: the kernel keeps no account of a call."""

    def __init__(self) -> None:
        self._cpu = time.process_time()

    def spent(self) -> dict[str, float]:
        """Return CPU seconds since the start, and the highest resident bytes of the process's life until now.

        The largest child that has ended counts as if it had peaked at the same moment.
        """
        return {"cpu_seconds": max(0.0, time.process_time() - self._cpu), "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Return the highest resident memory of this process, and of its largest ended child, in bytes."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return (own.ru_maxrss + children.ru_maxrss) * _MAXRSS_UNIT


def process_stats() -> dict[str, float | None]:
    """Return what this process holds and has used; ``unique_bytes`` is None where the kernel does not tell."""
    return {"unique_bytes": _unique_bytes(), "peak_bytes": peak_bytes(), "cpu_seconds": time.process_time()}


def _unique_bytes() -> int | None:
    """Return the memory that no other process shares (USS)."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
            return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_UNIQUE))
    except OSError:
        return None
