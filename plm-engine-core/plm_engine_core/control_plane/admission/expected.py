"""What the books are expected to say to the next proposal of a run, so that it need not be asked for on its own."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

from plm_engine_core.control_plane.limits import Prepared

_MOST_RUNS = 4096


class Expectations:
    """What `prepare` read last for each run, brought forward: the rate allows one more, and the clock has gone on.

    For whom a run works never changes. The other two are assumptions that a booking holds the books to: it takes the
    tokens itself and compares the time, and where either is not so, nothing is booked and `prepare` is asked after all.
    Only the runs that were prepared last are kept.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._runs: OrderedDict[tuple[int, int], tuple[Prepared, float]] = OrderedDict()  # by the ids as numbers

    def of(self, tenant_id: UUID, run_id: UUID) -> Prepared | None:
        """What `prepare` would say now; None where that has to be asked."""
        known = self._runs.get((tenant_id.int, run_id.int))
        if known is None:
            return None
        prepared, read = known
        at = prepared.at + timedelta(seconds=self._clock() - read)
        return Prepared(rate=prepared.rate, at=at, subjects=prepared.subjects)

    def learn(self, tenant_id: UUID, run_id: UUID, prepared: Prepared) -> None:
        """Go by this from now on. A rate that refused is asked again, so that whoever is too fast costs no bookings."""
        run = (tenant_id.int, run_id.int)
        self._runs.pop(run, None)
        if prepared.rate.allowed and prepared.subjects is not None:
            self._runs[run] = (prepared, self._clock())
            if len(self._runs) > _MOST_RUNS:
                self._runs.popitem(last=False)
