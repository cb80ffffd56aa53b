"""The OpenAPI document: what FastAPI finds in the routes, and what holds for all of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from plm_backend.problems import Problem

_BEARER = {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
_OPEN = frozenset({"/v1/health/live", "/v1/health/ready"})


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of an application, made once: every operation but health needs a bearer token."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = document.setdefault("components", {})
        components.setdefault("schemas", {})["Problem"] = Problem.model_json_schema()
        components["securitySchemes"] = {"bearer": _BEARER}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path in _OPEN else [{"bearer": []}]
        app.openapi_schema = document
    return app.openapi_schema
