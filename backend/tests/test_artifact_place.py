"""Where the files of runs are: in a folder, or in a bucket that every node reaches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from plm_backend.artifacts import Artifacts, row_of
from plm_engine_core.control_plane.ids import new_id
from plm_shared.artifact_store import open_store

BIN = Path(sys.executable).parent
LOGIN = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-central-1"}
FILE = {"name": "parts.csv", "text": "part,license\nBolt,MIT\n", "mime_type": "text/csv"}


@pytest.fixture
def s3() -> Iterator[str]:
    """The address of an S3 server of the test's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, env={**os.environ, **LOGIN}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not _listens(port):
            assert server.poll() is None
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_runs_take_their_files_from_a_bucket_and_leave_theirs_in_it(s3: str, launch: Callable[..., Any]) -> None:
    bucket = boto3.resource(
        "s3",
        endpoint_url=s3,
        region_name=LOGIN["AWS_DEFAULT_REGION"],
        aws_access_key_id=LOGIN["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=LOGIN["AWS_SECRET_ACCESS_KEY"],
    ).Bucket("files")
    bucket.create(CreateBucketConfiguration={"LocationConstraint": LOGIN["AWS_DEFAULT_REGION"]})
    with launch(PLM_ARTIFACTS=f"s3://files?endpoint={s3}", **LOGIN) as server:
        client = server.client()
        read = client.finished(client.run("read-file", files={"file": FILE})["run_id"])
        made = client.finished(client.run("make-file", name="a.txt", mime_type="text/plain", text="hello")["run_id"])
        assert (read["state"], made["state"]) == ("succeeded", "succeeded")
        kept = {each.key: each.get()["Body"].read() for each in bucket.objects.all()}
        assert sorted(kept.values()) == [b"hello", FILE["text"].encode()]
        [place] = [key for key, data in kept.items() if data == b"hello"]
        tenant, _, name = place.split("/")
        assert tenant == str(server.tenant)
        assert client.get(f"/v1/artifacts/{Path(name).stem}").content == b"hello"
        assert not (Path(server.environment["PLM_STATE_DIR"]) / "artifacts").exists()

        bucket.objects.all().delete()
        bucket.delete()
        refused = client.post("/v1/runs", json={"agent": "read-file", "files": {"file": FILE}})
        assert (refused.status_code, refused.json()["code"]) == (503, "dependency/storage_unavailable")
        assert "artifact store" in refused.json()["detail"]


def test_a_place_of_another_kind_is_refused_at_the_start_without_repeating_a_secret(
    settings_of: Callable[..., dict[str, str]], new_database: Callable[[], Any]
) -> None:
    environment = settings_of(new_database(), PLM_ARTIFACTS="s3://user:secret@bucket")
    command = [BIN / "plm-cli", "serve", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "PLM_ARTIFACTS" in done.stderr
    assert "secret" not in done.stderr


async def test_a_file_in_a_store_of_another_kind_is_not_looked_for_in_this_one(tmp_path: Path) -> None:
    tenant, run, trace = new_id(), new_id(), "0" * 31 + "1"
    store = open_store(str(tmp_path))
    record = await Artifacts(store, name="local").store(tenant, trace, name="a.txt", mime_type="text/plain", data=b"a")
    row = row_of(record, run_id=run, trace_id=trace)
    assert await Artifacts(store, name="local").fetch(tenant, row) == b"a"
    with pytest.raises(FileNotFoundError, match="of kind 'local', not 's3'"):
        await Artifacts(store, name="s3").fetch(tenant, row)
