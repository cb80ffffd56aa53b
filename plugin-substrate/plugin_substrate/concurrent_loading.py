"""Many plugins loaded or unloaded side by side, each with its own result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from plugin_substrate.errors import PluginError, PluginNotLoadedError
from plugin_substrate.metadata import PluginLoadSpec

T = TypeVar("T")


def result_keys(specs: Sequence[PluginLoadSpec]) -> list[str]:
    """Return under which key each spec's result stands: its instance id, ``name#new[i]``, or the plugin's name.

    ``i`` is the place of the spec in the sequence. Two specs of one key are a ValueError.
    """
    keys = [
        spec.instance_id or (f"{spec.meta.name}#new[{place}]" if spec.new_instance else spec.meta.name)
        for place, spec in enumerate(specs)
    ]
    doubled = sorted({key for key in keys if keys.count(key) > 1})
    if doubled:
        raise ValueError(f"{', '.join(doubled)}: named by several specs; give each its own instance_id or new_instance")
    return keys


async def run_concurrently(
    work: Mapping[str, Callable[[], Awaitable[T]]], *, max_concurrency: int | None, fail_fast: bool
) -> dict[str, T | Exception]:
    """Do every piece of work, at most so many at once, and return its value or its error under its key.

    With ``fail_fast`` nothing new is begun after the first error: what was not begun has a `PluginNotLoadedError`. What
    was begun is finished in any case. A ``max_concurrency`` below 1 is a ValueError; None is no limit.
    """
    if max_concurrency is not None and max_concurrency < 1:
        raise ValueError(f"max_concurrency must be at least 1, not {max_concurrency}")
    slots = asyncio.Semaphore(max_concurrency or max(1, len(work)))
    failed: list[str] = []

    async def one(key: str, do: Callable[[], Awaitable[T]]) -> T | Exception:
        async with slots:
            if fail_fast and failed:
                return PluginNotLoadedError(f"{key!r} was not attempted, as {failed[0]!r} had failed")
            try:
                return await do()
            except (PluginError, OSError, ValueError) as error:
                failed.append(key)
                return error

    results = await asyncio.gather(*(one(key, do) for key, do in work.items()))
    return dict(zip(work, results, strict=True))
