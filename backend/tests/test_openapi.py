"""The OpenAPI document is the API's promise: operations and statuses change only on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROMISED = Path(__file__).parent / "operations.txt"


def _operations(document: dict[str, Any]) -> list[str]:
    lines = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = " ".join(sorted(operation["responses"]))
            lines.append(f"{operation['operationId']} {method.upper()} {path} {statuses}")
    return sorted(lines)


def test_operations_and_their_statuses_are_the_promised_ones(client: Any) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert _operations(document) == PROMISED.read_text(encoding="utf-8").splitlines()


def test_every_error_is_documented_as_a_problem(client: Any) -> None:
    document = client.get("/openapi.json").json()
    assert {"type", "title", "status", "detail", "code"} <= document["components"]["schemas"]["Problem"][
        "properties"
    ].keys()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            open_to_all = path.startswith("/v1/health")
            assert bool(operation["security"]) is not open_to_all
            for status, response in operation["responses"].items():
                if status >= "400" and not open_to_all:
                    assert list(response["content"]) == ["application/problem+json"], (path, status)
