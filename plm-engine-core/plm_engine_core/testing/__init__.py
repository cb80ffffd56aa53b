"""The engine's test kit. Its pytest plugin is registered when plm-engine-core is installed.

`testing.clock` has the fake clock, `testing.approvers` the people who approve, deny or answer all that waits, and
`testing.crash_points` the names at which a process can be killed or held. The fixtures are `fake_clock`,
`memory_storage` and `engine_database`.

Nothing is imported here, because pytest loads this package at every start.
"""

from __future__ import annotations

__all__: list[str] = []
