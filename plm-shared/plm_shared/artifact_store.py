"""Where the files that runs produce are kept: a local folder, or an S3 bucket.

The path of an artifact is frozen: ``{tenant_id}/{trace_id}/{artifact_id}.{ext}``.
"""

from __future__ import annotations

from plm_shared.artifacts import (
    DEFAULT_MAX_BYTES,
    ArtifactCorrupt,
    ArtifactExists,
    ArtifactPage,
    ArtifactRef,
    ArtifactSizeExceeded,
    ArtifactStorageBackend,
    ListedArtifact,
    StoredArtifact,
)
from plm_shared.local_store import LocalFilesystemBackend
from plm_shared.object_store import ObjectStoreBackend

__all__ = [
    "DEFAULT_MAX_BYTES",
    "ArtifactCorrupt",
    "ArtifactExists",
    "ArtifactPage",
    "ArtifactRef",
    "ArtifactSizeExceeded",
    "ArtifactStorageBackend",
    "ListedArtifact",
    "LocalFilesystemBackend",
    "ObjectStoreBackend",
    "StoredArtifact",
]
