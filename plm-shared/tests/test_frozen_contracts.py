"""The contracts are frozen: any change of a model, a signature, a table, a constraint or a grant fails here.

A deliberate addition is taken over with ``PLM_FREEZE=1 pytest tests/test_frozen_contracts.py`` and shows in the review.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
from enum import Enum
from pathlib import Path
from typing import Any

import plm_shared
import psycopg
import pytest
from plm_shared.addresses import DatabaseUrls
from pydantic import BaseModel

FROZEN = Path(__file__).parent / "frozen"
QUERIES = {
    "columns": """
        SELECT c.relname || '.' || a.attname, format_type(a.atttypid, a.atttypmod)
            || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
            || coalesce(CASE WHEN a.attgenerated <> '' THEN ' generated ' ELSE ' default ' END
                || pg_get_expr(d.adbin, d.adrelid), '')
        FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid
        LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v') AND a.attnum > 0
            AND NOT a.attisdropped
    """,
    "constraints": """
        SELECT conrelid::regclass || '.' || conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conrelid <> 0 AND contype <> 'n'
    """,
    "indexes": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "policies": """
        SELECT tablename || '.' || policyname,
            concat_ws(' ', permissive, roles, cmd, 'using', qual, 'check', with_check)
        FROM pg_policies WHERE schemaname = 'public'
    """,
    "row-level security": """
        SELECT relname, 'enabled ' || relrowsecurity || ', forced ' || relforcerowsecurity FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    """,
    "triggers": """
        SELECT tgrelid::regclass || '.' || tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
    """,
    "functions": """
        SELECT p.proname, pg_get_functiondef(p.oid) FROM pg_proc AS p WHERE pronamespace = 'public'::regnamespace
    """,
    "types": """
        SELECT t.typname, string_agg(e.enumlabel, ', ' ORDER BY e.enumsortorder) FROM pg_type AS t
        JOIN pg_enum AS e ON e.enumtypid = t.oid GROUP BY 1
    """,
    "grants": """
        SELECT c.relname || ' to ' || acl.grantee::regrole,
            string_agg(acl.privilege_type, ', ' ORDER BY acl.privilege_type)
        FROM pg_class AS c, aclexplode(c.relacl) AS acl
        WHERE c.relnamespace = 'public'::regnamespace AND acl.grantee <> c.relowner
            AND acl.grantee IN (SELECT oid FROM pg_roles)
        GROUP BY 1
    """,
    "column grants": """
        SELECT c.relname || '.' || a.attname || ' to ' || acl.grantee::regrole, string_agg(acl.privilege_type, ', ')
        FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid, aclexplode(a.attacl) AS acl
        WHERE c.relnamespace = 'public'::regnamespace GROUP BY 1
    """,
    "roles": """
        SELECT rolname, concat_ws(' ', 'login', rolcanlogin, 'bypassrls', rolbypassrls, 'superuser', rolsuper)
        FROM pg_roles WHERE rolname LIKE 'plm%'
    """,
    "memberships": """
        SELECT member::regrole || ' in ' || roleid::regrole, '' FROM pg_auth_members
        WHERE roleid::regrole::text LIKE 'plm%'
    """,
}


def modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(plm_shared.__path__, "plm_shared.")]
    return sorted(name for name in names if ".migrations.versions" not in name and not name.endswith(".env"))


def models() -> dict[str, Any]:
    found = {}
    for name in modules():
        module = importlib.import_module(name)
        for key in getattr(module, "__all__", []):
            value = getattr(module, key)
            if inspect.isclass(value) and issubclass(value, BaseModel) and value.__module__ == name:
                found[f"{name}.{key}"] = value.model_json_schema()
    return found


def signatures() -> dict[str, str]:
    found = {}
    for name in modules():
        module = importlib.import_module(name)
        for key in getattr(module, "__all__", []):
            value = getattr(module, key)
            if isinstance(value, str | int | frozenset | tuple):
                found[f"{name}.{key}"] = repr(sorted(value) if isinstance(value, frozenset) else value)
            elif getattr(value, "__module__", name) == name:
                found |= described(f"{name}.{key}", value)
    return found


def signature(function: Any) -> str:
    described = inspect.signature(function)
    parameters = [
        each.replace(default=tuple(sorted(each.default))) if isinstance(each.default, frozenset) else each
        for each in described.parameters.values()
    ]
    return re.sub(r" at 0x[0-9a-f]+", "", str(described.replace(parameters=parameters)))


def described(path: str, value: Any) -> dict[str, str]:
    if inspect.isclass(value) and issubclass(value, Enum):
        return {path: ", ".join(f"{member.name}={member.value}" for member in value)}
    if inspect.isclass(value) and issubclass(value, BaseModel):
        return {path: "model"}
    if inspect.isclass(value):
        found = {path: f"class({', '.join(base.__name__ for base in value.__bases__)})"}
        if hasattr(value, "_fields"):
            found[path] += " " + ", ".join(
                f"{name}: {getattr(kind, '__forward_arg__', kind)}" for name, kind in value.__annotations__.items()
            )
        if dataclasses.is_dataclass(value):
            found[path] += " " + ", ".join(f"{field.name}: {field.type}" for field in dataclasses.fields(value))
        for name, member in vars(value).items():
            if inspect.isfunction(member) and (not name.startswith("_") or name == "__init__"):
                found[f"{path}.{name}"] = signature(member)
            elif isinstance(member, property):
                found[f"{path}.{name}"] = "property"
        return found
    if inspect.isfunction(value):
        return {path: signature(value)}
    return {}


def schema(database: DatabaseUrls) -> dict[str, dict[str, str]]:
    with psycopg.connect(database.owner) as connection:
        connection.execute("SET search_path = pg_catalog")
        found = {}
        for name, query in QUERIES.items():
            found[name] = dict(sorted(connection.execute(query.encode()).fetchall()))
        return found


def assert_frozen(name: str, found: Any) -> None:
    file = FROZEN / f"{name}.json"
    text = json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    if os.environ.get("PLM_FREEZE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8")) == json.loads(text)


def test_the_json_schema_of_every_public_model_is_the_committed_one() -> None:
    assert_frozen("models", models())


def test_every_public_signature_is_the_committed_one() -> None:
    assert_frozen("signatures", signatures())


@pytest.mark.every_postgres
def test_every_table_constraint_policy_and_grant_is_the_committed_one(kernel_database: DatabaseUrls) -> None:
    assert_frozen("schema", schema(kernel_database))
