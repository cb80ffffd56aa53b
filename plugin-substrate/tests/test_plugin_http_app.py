"""A plugin behind HTTP answers as the published system's worker did, from a confined one, to this machine alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from plugin_substrate.http_app import create_app

PLUGINS = Path(__file__).parent / "plugins"

Served = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def served(module: str, class_name: str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(module, class_name, place=PLUGINS, **options)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client,
    ):
        yield client


@pytest.fixture
async def probe() -> AsyncIterator[httpx.AsyncClient]:
    async with served("probe", "Probe") as client:
        yield client


async def call(client: httpx.AsyncClient, action: str, **arguments: Any) -> httpx.Response:
    return await client.post("/execute", json={"kwargs": {"action": f"probe.{action}", **arguments}})


async def test_a_call_has_the_bare_result_and_runs_in_a_confined_worker(probe: httpx.AsyncClient) -> None:
    answer = await call(probe, "echo", x=[1, None])
    assert (answer.status_code, answer.json()) == (200, {"x": [1, None]})
    health = (await probe.get("/health")).json()
    assert (health["status"], health["name"]) == ("running", "Probe")
    assert "no_new_privs" in health["layers"]
    assert (await call(probe, "count")).json()[1] == health["pid"]
    (worker,) = (await probe.get("/stats")).json()["workers"]
    assert worker["pid"] == health["pid"]
    report = await call(probe, "report", steps=3)
    assert report.json() == {"name": "report.txt", "mime_type": "text/plain", "data": {"base64": "ZG9uZQ=="}}
    assert (await probe.get("/progress")).json()["message"] == "step 2"


async def test_an_error_has_its_text_and_its_type(probe: httpx.AsyncClient) -> None:
    failed = await call(probe, "fail", how="input")
    assert (failed.status_code, failed.json()["detail"]) == (500, "bad rows")
    assert failed.json()["error"]["fields_invalid"] == ["rows", "unit"]
    assert (await probe.post("/execute", json=[])).status_code == 422
    assert (await probe.post("/get_system_status")).status_code == 404


async def test_a_running_call_is_cancelled(probe: httpx.AsyncClient) -> None:
    assert (await probe.post("/cancel")).json() == {"status": "not_running"}
    running = asyncio.create_task(call(probe, "polite"))
    async with asyncio.timeout(60):
        while (await probe.get("/progress")).json()["message"] != "running":  # noqa: ASYNC110 - it is asked for
            await asyncio.sleep(0.01)
        assert (await probe.post("/cancel")).json() == {"status": "cancelled"}
        assert (await running).status_code == 409


async def test_chunks_are_lines_and_an_error_is_the_last_one() -> None:
    async with served("streamer", "Streamer") as client:
        answer = await client.post("/execute_stream", json={"kwargs": {"kind": "fails", "after": 2}})
        *chunks, last = map(json.loads, answer.text.splitlines())
        assert chunks == [0, 1]
        assert last["_job_error"]["resource_shortfall"] == {"resource": "ram", "needed": 10, "available": 4}


async def test_a_configuration_is_given_changed_and_told() -> None:
    async with served("adjustable", "Adjustable", config={"model": "small"}) as client:
        assert (await client.get("/config")).json() == {"model": "small"}
        assert "threshold" in (await client.get("/config_schema")).json()["properties"]
        assert (await client.get("/config_options")).json()["device"]["options"][0]["label"] == "Processor"
        changed = await client.post("/reconfigure", json={"new_config": {"model": "large"}})
        assert changed.json() == {"status": "reconfigured"}
        assert (await client.get("/config")).json() == {"model": "large"}
        assert (await client.post("/initialize", json={"model": "unloadable"})).status_code == 400
        assert (await client.post("/prefetch")).json() == {"status": "prefetched"}
        for verb, status in (("on_disable", "disabled"), ("on_enable", "enabled"), ("cleanup", "cleaned")):
            assert (await client.post(f"/{verb}")).json() == {"status": status}
        assert (await client.post("/execute", json={})).status_code == 500


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "evil.example"}, 400),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost"}, 200),
    ],
)
async def test_no_web_page_calls_the_plugin(probe: httpx.AsyncClient, headers: dict[str, str], status: int) -> None:
    arguments = {"kwargs": {"action": "probe.echo"}}
    assert (await probe.post("/execute", json=arguments, headers=headers)).status_code == status
