"""The demo as an API client: what any client of the platform would do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import httpx_sse

from plm_backend.errors import BackendError


class DemoFailed(BackendError):  # reads as what happened
    """The API refused something the demo needs; the message has its problem document."""


@dataclass(frozen=True, kw_only=True)
class News:
    """One server-sent event of a run: a recorded event with its sequence, or passing progress without one."""

    kind: str
    data: Mapping[str, Any]


class ApiClient:
    """Speaks to the API as one identity."""

    def __init__(self, url: str, token: str) -> None:
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=httpx.Timeout(10.0, read=60.0)
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """A document."""
        return self._checked(self._http.get(path, params=parameters)).json()

    def post(self, path: str, body: Mapping[str, Any], **headers: str) -> Any:
        """Post a document and answer what comes back."""
        return self._checked(self._http.post(path, json=body, headers=headers)).json()

    def download(self, path: str) -> bytes:
        """Bytes."""
        return self._checked(self._http.get(path)).content

    def follow(self, run_id: str) -> Iterator[News]:
        """Every event of a run, once and in order, resuming after a lost connection, until its end."""
        last = ""
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                with httpx_sse.connect_sse(self._http, "GET", f"/v1/runs/{run_id}/events", headers=headers) as source:
                    self._checked(source.response)
                    for event in source.iter_sse():
                        last = event.id or last
                        if event.data:  # heartbeats have none
                            yield News(kind=event.event, data=json.loads(event.data))
                return
            except httpx.TransportError:
                continue

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_error:
            response.read()
            raise DemoFailed(f"{response.request.method} {response.request.url.path}: {response.text}")
        return response
