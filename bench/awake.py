"""Processors that wait for work instead of being halted, as one sets a server that has to answer soon."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

LATENCY = Path("/dev/cpu_dma_latency")  # while it is open: in how many microseconds a processor has to be awake


@contextmanager
def processors_awake() -> Iterator[None]:
    """Meanwhile an idle processor waits for work and is not halted; where that may not be asked for, stderr says so.

    What a processor does after it was halted it does slowly for a while: how slowly is the machine's and its host's.
    The request is the kernel's "PM Quality Of Service Interface"; the profile `latency-performance` of `tuned` makes it
    for as long as a server is up.
    """
    with ExitStack() as stack:
        try:
            request = stack.enter_context(LATENCY.open("wb", buffering=0))
            request.write(struct.pack("=i", 0))
        except OSError as error:
            print(f"idle processors are halted as ever, and rates are lower for it: {error}", file=sys.stderr)
        yield
