"""Dictionaries and one lock behind the ports: for embedding and for tests; nothing outlives the process."""

from plm_engine_core.control_plane.storage.memory.storage import MemoryStorage

__all__ = ["MemoryStorage"]
