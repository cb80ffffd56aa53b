"""The host's side of `preload`: a template process per seat of a plugin, of which that seat's workers are copies.

A template is confined as its workers are and serves one seat alone: one tenant, or all of a stateless plugin. It is
started when a worker is first wanted, anew when it is dead, and goes with the last who may want one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from plugin_substrate.lifecycle import Supervisor, WorkerProcess
from plugin_substrate.proxy import RemotePluginProxy
from plugin_substrate.worker.isolation import IsolationProfile


@dataclass(frozen=True, kw_only=True)
class TemplateKey:
    """What the workers of one template have in common."""

    plugin_name: str
    python: str
    module: str
    folder: Path
    isolation: IsolationProfile


class Template:
    """One template. Belongs to one event loop."""

    def __init__(self, key: TemplateKey) -> None:
        self.users = 0
        self._key = key
        self._turn = asyncio.Lock()
        self._supervisor: Supervisor | None = None
        self._proxy: RemotePluginProxy | None = None

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines of its process."""
        return self._proxy.log_tail if self._proxy is not None else ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that confine it and its copies, as it said before it ran foreign code."""
        return self._proxy.layers if self._proxy is not None else ()

    @property
    def began(self) -> bool:
        """Whether its supervisor has ever brought it up."""
        return self._proxy is not None

    async def copy(
        self,
        supervisor: Supervisor,
        env: dict[str, str],
        *,
        own_env: dict[str, str],
        required_layers: Sequence[str],
        on_line: Callable[[str, str], object],
        on_progress: Callable[[float, str], object],
    ) -> WorkerProcess:
        """Return a worker that has the plugin's module already; ``env`` is its environment, ``own_env`` the template's.

        A `PluginLoadError`, a `WorkerDiedError` or a `PluginFatalError` tells why there is none. Whoever gives up
        waiting for one ends the template: nobody knows what state it is in.
        """
        async with self._turn:
            try:
                if self._supervisor is not supervisor or self._proxy is None or not self._proxy.alive:
                    await self._start(supervisor, own_env, on_line)
                    assert self._proxy is not None  # noqa: S101 - `_start` has set it
                    await self._proxy.require(required_layers)
                    await self._proxy.preload(self._key.module, on_progress=on_progress)
                return await supervisor.spawn(
                    env=env, cwd=self._key.folder, isolation=self._key.isolation, copy_of=self._proxy.process
                )
            except BaseException:
                await self._kill()
                raise

    async def close(self) -> None:
        """End its process."""
        async with self._turn:
            await self._kill()

    async def _start(self, supervisor: Supervisor, env: dict[str, str], on_line: Callable[[str, str], object]) -> None:
        await self._kill()
        process = await supervisor.spawn(env=env, cwd=self._key.folder, isolation=self._key.isolation, template=True)
        self._supervisor, self._proxy = supervisor, RemotePluginProxy(process, on_line)

    async def _kill(self) -> None:
        if self._proxy is not None:
            await self._proxy.kill()


class TemplateTable:
    """Which template serves which seat. Belongs to one event loop."""

    def __init__(self) -> None:
        self._templates: dict[TemplateKey, Template] = {}

    def join(self, key: TemplateKey) -> Template:
        """Announce one more user; each must `leave` once."""
        template = self._templates.setdefault(key, Template(key))
        template.users += 1
        return template

    async def leave(self, key: TemplateKey) -> None:
        """Take one user away; with the last one the template ends."""
        template = self._templates[key]
        template.users -= 1
        if not template.users:
            del self._templates[key]
            await template.close()
