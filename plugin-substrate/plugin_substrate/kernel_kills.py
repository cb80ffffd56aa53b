"""Whether the kernel has killed processes for want of memory: of a machine, or of a control group with a limit."""

from __future__ import annotations

from pathlib import Path

_VMSTAT = Path("/proc/vmstat")


def oom_kills() -> int:
    """Return how many processes it has killed for want of memory since it started; 0 where it does not count."""
    try:
        lines = _VMSTAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
