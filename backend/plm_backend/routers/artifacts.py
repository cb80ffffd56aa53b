"""Artifacts: the files that runs took in and left behind."""

from __future__ import annotations

from pathlib import PurePosixPath
from uuid import UUID

from fastapi import APIRouter, Response
from plm_engine_core.control_plane.errors import NotFound

from plm_backend.dependencies import TheCaller, ThePlatform
from plm_backend.problems import DOORS, documented

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])


@router.get(
    "/{artifact_id}",
    operation_id="getArtifact",
    response_class=Response,
    responses={
        200: {"description": "The bytes, in the file's own media type.", "content": {"*/*": {}}},
        **documented(*DOORS, 404),
    },
)
async def get_artifact(artifact_id: UUID, platform: ThePlatform, caller: TheCaller) -> Response:
    """The bytes. They were made by a plugin, so a browser is told to save them, never to run them."""
    row = await platform.control_plane.storage.runs.artifact(caller.tenant_id, artifact_id)
    try:
        data = await platform.artifacts.fetch(caller.tenant_id, row)
    except FileNotFoundError as error:
        raise NotFound("the content of artifact", artifact_id) from error
    suffix = PurePosixPath(row.storage_uri).suffix
    return Response(
        data,
        media_type=row.mime_type,
        headers={
            "Content-Disposition": f'attachment; filename="{artifact_id}{suffix}"',
            "Content-Security-Policy": "sandbox; default-src 'none'",
            "X-Content-Type-Options": "nosniff",
        },
    )
