"""Makes a process that was started without ``site`` one of its environment, when its code may run at last."""

from __future__ import annotations

import site
import sys
from typing import Any


class FlagsWithSite(tuple[Any, ...]):
    """``sys.flags`` of a process that has site, though it was not started with it."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return 0 if name == "no_site" else getattr(_STARTED_WITH, name)

    def __repr__(self) -> str:
        return repr(_STARTED_WITH).replace("no_site=1", "no_site=0")


_STARTED_WITH = sys.flags


def enter_environment() -> None:
    """Run the environment's start-up code, and no longer say that it did not run; nothing where it ran already.

    A Python that plugin code starts inherits this process's flags in many libraries (multiprocessing's way of starting
    its helpers): with ``-S`` among them it would not find the environment.
    """
    if sys.flags is not _STARTED_WITH:
        return
    site.main()
    no_site = _STARTED_WITH.__match_args__.index("no_site")
    sys.flags = FlagsWithSite(0 if index == no_site else value for index, value in enumerate(_STARTED_WITH))  # type: ignore[assignment]
