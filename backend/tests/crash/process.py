"""`plm-cli` whose ports ask the test at every crash point; its socket is named in CRASH_POINTS."""

from __future__ import annotations

import os
from typing import Any

from plm_backend import wiring
from plm_backend.artifacts import Artifacts
from plm_engine_core.cli import main, storage
from plm_engine_core.testing.crash_points import PORTS, ask_test, instrumented

ALL_PORTS = {**PORTS, "artifacts": Artifacts}


def _instrument() -> None:
    reach = ask_test(os.environ["CRASH_POINTS"])

    def made(name: str, original: Any) -> Any:
        return lambda *args, **kwargs: instrumented(name, ALL_PORTS[name], original(*args, **kwargs), reach)

    def stored(original: Any) -> Any:
        def make(pool: Any, delivery: Any) -> Any:
            books = original(pool, instrumented("delivery", PORTS["delivery"], delivery, reach))
            for name in ("admission", "approvals", "halts", "runs"):
                instrumented(name, PORTS[name], getattr(books, name), reach)
            return books

        return make

    for module in (wiring, storage):
        module.PostgresStorage = stored(module.PostgresStorage)
        module.PostgresAuditSink = made("audit", module.PostgresAuditSink)
    wiring.Artifacts = made("artifacts", wiring.Artifacts)
    wiring.Driver = made("driver", wiring.Driver)
    wiring.PluginExecutor = made("executor", wiring.PluginExecutor)
    wiring.PostgresSignals = made("signals", wiring.PostgresSignals)


if __name__ == "__main__":
    _instrument()
    main()
