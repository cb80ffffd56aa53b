"""Events: the authority on what happened, one dense hash chain per stream."""

from plm_engine_core.control_plane.events.archive import Archive, Archivist, Piece, open_archive
from plm_engine_core.control_plane.events.as_of import RunAsOf, as_of
from plm_engine_core.control_plane.events.checkpoint import Checkpoint, Head
from plm_engine_core.control_plane.events.event import TENANT_STREAM, Event, event_hash, run_stream
from plm_engine_core.control_plane.events.export import Exported, export, read_exports
from plm_engine_core.control_plane.events.feed import BEGINNING, FeedCursor, FeedPage, HeldBack
from plm_engine_core.control_plane.events.projections import Difference, Projections, rebuild
from plm_engine_core.control_plane.events.pruning import Pruned, prune_events
from plm_engine_core.control_plane.events.signing import PublicKeys, Signer, load_public_keys, load_signer
from plm_engine_core.control_plane.events.verify import StreamHead, Stub, Verification, verify_streams, verify_tenant

__all__ = [
    "BEGINNING",
    "TENANT_STREAM",
    "Archive",
    "Archivist",
    "Checkpoint",
    "Difference",
    "Event",
    "Exported",
    "FeedCursor",
    "FeedPage",
    "Head",
    "HeldBack",
    "Piece",
    "Projections",
    "Pruned",
    "PublicKeys",
    "RunAsOf",
    "Signer",
    "StreamHead",
    "Stub",
    "Verification",
    "as_of",
    "event_hash",
    "export",
    "load_public_keys",
    "load_signer",
    "open_archive",
    "prune_events",
    "read_exports",
    "rebuild",
    "run_stream",
    "verify_streams",
    "verify_tenant",
]
