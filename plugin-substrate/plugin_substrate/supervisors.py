"""Which supervisor serves which plugin: one per plugin and interpreter, shared by its instances, gone with the last."""

from __future__ import annotations

from dataclasses import dataclass, field

from plugin_substrate.lifecycle import Supervisor

Key = tuple[str, str]  # plugin name, interpreter


@dataclass
class _Place:
    users: int = 0
    supervisors: list[Supervisor] = field(default_factory=list)  # the last one serves, those before it are dying


class SupervisorPool:
    """Counts the instances of each plugin. Belongs to one event loop."""

    def __init__(self) -> None:
        self._places: dict[Key, _Place] = {}

    def join(self, key: Key) -> None:
        """Announce one more user."""
        self._places.setdefault(key, _Place()).users += 1

    def get(self, key: Key) -> Supervisor:
        """Return the live supervisor of a key that was joined, starting one when there is none."""
        supervisors = self._places[key].supervisors
        if not supervisors or not supervisors[-1].alive:
            supervisors[:] = [dying for dying in supervisors if not dying.ended]
            supervisors.append(Supervisor(key[1], key[0]))
        return supervisors[-1]

    async def leave(self, key: Key) -> None:
        """Take one user away; with the last one the supervisor ends, and this returns when its processes are gone."""
        place = self._places[key]
        place.users -= 1
        if place.users == 0:
            del self._places[key]
            for supervisor in place.supervisors:
                await supervisor.close()
