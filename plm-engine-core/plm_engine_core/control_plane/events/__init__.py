"""Events: the authority on what happened, one dense hash chain per stream."""

from plm_engine_core.control_plane.events.event import TENANT_STREAM, Event, event_hash, run_stream
from plm_engine_core.control_plane.events.verify import StreamHead, Verification, verify_stream

__all__ = ["TENANT_STREAM", "Event", "StreamHead", "Verification", "event_hash", "run_stream", "verify_stream"]
