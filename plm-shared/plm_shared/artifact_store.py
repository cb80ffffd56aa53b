"""Where the files that runs produce are kept: a local folder, or an S3 bucket.

The path of an artifact is frozen: ``{tenant_id}/{trace_id}/{artifact_id}.{ext}``.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

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
    "open_store",
]


def open_store(address: str) -> ArtifactStorageBackend:
    """The store in a folder, or in ``s3://bucket`` (``?endpoint=URL`` for another server than Amazon's).

    Credentials for S3 come from where boto3 looks for them, never from the address.

    Raises:
        ValueError: the address is of another kind.
        ImportError: what S3 needs is not installed.
    """
    parts = urlsplit(address)
    if parts.scheme in ("", "file"):
        return LocalFilesystemBackend(Path(parts.path if parts.scheme else address))
    if parts.scheme != "s3" or not parts.hostname or parts.username or parts.path.strip("/"):
        raise ValueError(f"{parts.scheme}:… is no place for files; name a folder, or s3://bucket")
    endpoint = parse_qs(parts.query).get("endpoint", [None])[0]
    return ObjectStoreBackend(bucket=parts.hostname, endpoint_url=endpoint)
