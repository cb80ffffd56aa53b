"""Artifacts in an S3 bucket."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, Final

from plm_shared.artifacts import (
    CHUNK,
    DEFAULT_MAX_BYTES,
    ArtifactExists,
    ArtifactPage,
    ArtifactRef,
    ListedArtifact,
    Meter,
    StoredArtifact,
    checked_page,
    ref_at,
    verified,
)

__all__ = ["ObjectStoreBackend"]

_UPLOAD_PART: Final = 8 * 1024 * 1024  # all that is held in memory; S3 takes ten thousand parts
_RETRIES: Final = 5
_LONGEST_PRESIGNED: Final = 7 * 24 * 3600  # S3's own limit for signature version 4
_HASH, _NOTE = "sha256", "sha256-note"  # metadata: the hash itself, or the name of the object that holds it
_ABSENT: Final = {"NoSuchKey", "NotFound", "404"}
_EXISTS: Final = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}


class ObjectStoreBackend:
    """Artifacts in an S3 bucket. Requests are retried, and a download that breaks off goes on where it was.

    More than 8 MiB go in parts, and appear only when complete. The size limit holds while streaming: too much data is
    never fully uploaded. ``only_if_absent`` is decided by the server where it honours ``If-None-Match``, which is tried
    once; elsewhere by a look before the upload, which another writer may slip past: ``conditional_put`` tells which.

    The hash of each artifact is kept with it and checked whenever the artifact is read. That of an upload in parts is
    known too late for the object's own metadata: it stands in a note below ``.sha256/``, written before the upload is
    completed and named by the object, so that content and hash change together. Deleting takes the note along;
    replacing leaves the old one, 64 bytes.

    Raises:
        ImportError: boto3 is missing and no ``client`` was given.
    """

    def __init__(
        self,
        *,
        bucket: str,
        endpoint_url: str | None = None,
        region_name: str | None = None,
        aws_access_key_id: str | None = None,
        aws_secret_access_key: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        client: Any = None,
    ) -> None:
        self._bucket = bucket
        self._max_bytes = max_bytes
        self._conditional: bool | None = None
        self._client = client or _s3_client(
            endpoint_url=endpoint_url,
            region_name=region_name,
            aws_access_key_id=aws_access_key_id,
            aws_secret_access_key=aws_secret_access_key,
        )

    @property
    def conditional_put(self) -> bool:
        """Whether the server itself refuses to replace an object when asked to."""
        if self._conditional is None:
            self._conditional = self._try_conditional_put()
        return self._conditional

    def store(self, ref: ArtifactRef, data: BinaryIO, *, only_if_absent: bool = False) -> StoredArtifact:
        """Stream into the bucket.

        Raises:
            ArtifactSizeExceeded: nothing was stored; an older version stands.
            ArtifactExists: it is there and was to be stored only if absent.
        """
        stored_uri = self._uri(ref)
        condition: dict[str, str] = {}
        if only_if_absent:
            if self._head(ref) is not None:
                raise ArtifactExists(stored_uri)
            condition = {"IfNoneMatch": "*"} if self.conditional_put else {}
        meter = Meter(data, self._max_bytes)
        first = _filled(meter)
        try:
            if len(first) < _UPLOAD_PART:
                self._put(ref.relative_path, first, Metadata={_HASH: meter.stored_at(stored_uri).sha256}, **condition)
            else:
                self._upload_parts(ref, first, meter, condition)
        except self._client.exceptions.ClientError as error:
            if condition and _code(error) in _EXISTS:
                raise ArtifactExists(stored_uri) from error
            raise
        return meter.stored_at(stored_uri)

    def put(self, ref: ArtifactRef, data: BinaryIO) -> str:
        """``store``, answering only the ``s3://`` URI."""
        return self.store(ref, data).uri

    def open(self, ref: ArtifactRef) -> Iterator[bytes]:
        """The object in chunks, all of one version.

        Raises:
            FileNotFoundError: there is no such artifact.
            ArtifactCorrupt: in place of the last chunk.
        """
        answer = self._request(ref.relative_path)
        return verified(self._uri(ref), self._chunks(ref, answer), self._hashes(answer["Metadata"]))

    def get(self, ref: ArtifactRef) -> bytes:
        """The object's bytes; raises as ``open`` does."""
        return b"".join(self.open(ref))

    def presign_url(self, ref: ArtifactRef, expires_in: int = 3600) -> str:
        """A signed address, good for ``expires_in`` seconds.

        Raises:
            ValueError: S3 signs for one second to seven days.
        """
        if not 0 < expires_in <= _LONGEST_PRESIGNED:
            raise ValueError(f"expires_in must be 1 to {_LONGEST_PRESIGNED} seconds, not {expires_in}")
        url = self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": ref.relative_path}, ExpiresIn=expires_in
        )
        return str(url)

    def delete(self, ref: ArtifactRef) -> None:
        """Remove the object if it is there."""
        metadata = (self._head(ref) or {}).get("Metadata", {})
        self._remove(ref.relative_path)
        if _NOTE in metadata:
            self._remove(metadata[_NOTE])

    def list(self, tenant_id: str, *, after: str | None = None, limit: int = 1000) -> ArtifactPage:
        """The artifacts of a tenant in the order of their names; their ages are by the server's clock.

        Raises:
            ValueError: the tenant is no UUID in its canonical text, or the limit is none.
        """
        prefix = f"{checked_page(tenant_id, limit)}/"
        place = {"StartAfter": prefix + after} if after is not None else {}
        answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, MaxKeys=limit, **place)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        objects = answer.get("Contents", [])
        found = [
            ListedArtifact(ref=ref, size_bytes=each["Size"], age_seconds=(now - each["LastModified"]).total_seconds())
            for each in objects
            if (ref := ref_at(each["Key"])) is not None
        ]
        last = objects[-1]["Key"].removeprefix(prefix) if answer["IsTruncated"] else None
        return ArtifactPage(artifacts=found, after=last)

    def _upload_parts(self, ref: ArtifactRef, part: bytes, meter: Meter, condition: dict[str, str]) -> None:
        place = {"Bucket": self._bucket, "Key": ref.relative_path}
        note = f".sha256/{ref.relative_path}/{uuid.uuid4().hex}"
        place["UploadId"] = self._client.create_multipart_upload(**place, Metadata={_NOTE: note})["UploadId"]
        parts: list[dict[str, Any]] = []
        try:
            while part:
                number = len(parts) + 1
                tag = self._client.upload_part(**place, PartNumber=number, Body=part)["ETag"]
                parts.append({"PartNumber": number, "ETag": tag})
                part = _filled(meter)
            self._put(note, meter.stored_at(note).sha256.encode())
            self._client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts}, **condition)
        except BaseException:
            self._client.abort_multipart_upload(**place)
            self._remove(note)
            raise

    def _chunks(self, ref: ArtifactRef, answer: dict[str, Any]) -> Iterator[bytes]:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        offset = 0
        failures = 0
        while True:
            try:
                with closing(answer["Body"]) as body:
                    while chunk := body.read(CHUNK):
                        offset += len(chunk)
                        yield chunk
            except (HTTPClientError, IncompleteReadError):
                failures += 1
                if failures > _RETRIES:
                    raise
                answer = self._request(ref.relative_path, Range=f"bytes={offset}-", IfMatch=answer["ETag"])
            else:
                return

    def _hashes(self, metadata: dict[str, str]) -> Sequence[str]:
        """What the content may hash to: nothing when that was lost, or never kept by whoever put the object there."""
        if _NOTE not in metadata:
            return [metadata[_HASH]] if _HASH in metadata else []
        try:
            with closing(self._request(metadata[_NOTE])["Body"]) as body:
                return [body.read().decode("ascii", "replace")]
        except FileNotFoundError:
            return []

    def _put(self, key: str, data: bytes, **options: Any) -> None:
        self._client.put_object(Bucket=self._bucket, Key=key, Body=data, **options)

    def _request(self, key: str, **options: str) -> dict[str, Any]:
        try:
            return dict(self._client.get_object(Bucket=self._bucket, Key=key, **options))
        except self._client.exceptions.ClientError as error:
            if _code(error) in _ABSENT:
                raise FileNotFoundError(f"s3://{self._bucket}/{key}") from error
            raise

    def _head(self, ref: ArtifactRef) -> dict[str, Any] | None:
        try:
            return dict(self._client.head_object(Bucket=self._bucket, Key=ref.relative_path))
        except self._client.exceptions.ClientError as error:
            if _code(error) in _ABSENT:
                return None
            raise

    def _remove(self, key: str) -> None:
        try:
            self._client.delete_object(Bucket=self._bucket, Key=key)
        except self._client.exceptions.ClientError as error:
            if _code(error) not in _ABSENT:
                raise

    def _try_conditional_put(self) -> bool:
        """Put a probe twice: a server that takes the second has not looked at the condition."""
        probe = {"Bucket": self._bucket, "Key": f".conditional-put/{uuid.uuid4().hex}"}
        try:
            for _ in range(2):
                self._client.put_object(**probe, Body=b"", IfNoneMatch="*")
        except self._client.exceptions.ClientError as error:
            if _code(error) in _EXISTS:
                return True
            if _code(error) not in {"NotImplemented", "InvalidRequest", "InvalidArgument", "501", "400"}:
                raise
        finally:
            self._client.delete_object(**probe)
        return False

    def _uri(self, ref: ArtifactRef) -> str:
        return f"s3://{self._bucket}/{ref.relative_path}"


def _s3_client(**options: str | None) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ImportError("ObjectStoreBackend needs boto3: install plm-shared[s3], or pass client=") from error
    retries = {"mode": "standard", "total_max_attempts": _RETRIES}
    return boto3.client("s3", **options, config=Config(signature_version="s3v4", retries=retries))


def _filled(meter: Meter) -> bytes:
    """The next part, full unless the stream ends; a stream may hand out less than it was asked for."""
    part = bytearray()
    while len(part) < _UPLOAD_PART and (chunk := meter.read(min(CHUNK, _UPLOAD_PART - len(part)))):
        part += chunk
    return bytes(part)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
