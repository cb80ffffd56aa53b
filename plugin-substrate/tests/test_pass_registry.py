"""The registry of file plugins: one bad package is rejected alone, with its reason."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from plugin_substrate.passes import PluginRegistry

SOAK = float(os.environ.get("SOAK", "0.05"))
GOOD = "name: {name}\nversion: 1.0\nsupported_extensions: [.txt]\napi_version: 1\n"

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(
        folder: str = "good", manifest: str | bytes | None = None, *, root: str = "bundled", code: bool = True
    ) -> Path:
        package = tmp_path / root / folder
        package.mkdir(parents=True)
        text = GOOD.format(name=folder) if manifest is None else manifest
        (package / "manifest.yml").write_bytes(text.encode() if isinstance(text, str) else text)
        if code:
            (package / "__init__.py").write_text("raise SystemExit('the host must not import this')")
        return package

    return made


def registry(tmp_path: Path, **options: object) -> PluginRegistry:
    return PluginRegistry(tmp_path / "bundled", tmp_path / "lab", **options)  # type: ignore[arg-type]


BAD = {
    "missing required field 'name'": "version: 1",
    "missing required field 'supported_extensions'": "name: x\nversion: '1'\napi_version: '1'",
    "invalid name 'a b'": GOOD.format(name="'a b'"),
    "unsupported api_version '2'": GOOD.format(name="x").replace("api_version: 1", "api_version: 2"),
    "supported_extensions must be a list of strings": GOOD.format(name="x").replace("[.txt]", "[1]"),
    "author must be a text, not ['a']": GOOD.format(name="x") + "author: [a]",
    "required_variables must be a list of strings": GOOD.format(name="x") + "required_variables: [1]",
    "isolation block must be a mapping": GOOD.format(name="x") + "isolation: [1]",
    "isolation.timeout_seconds=301 exceeds cap 300": GOOD.format(name="x") + "isolation: {timeout_seconds: 301}",
    "isolation.memory_mb=2049 exceeds cap 2048": GOOD.format(name="x") + "isolation: {memory_mb: 2049}",
    "isolation.timeout_seconds must be a whole number, not nan": GOOD.format(name="x")
    + "isolation: {timeout_seconds: .nan}",
    "isolation.memory_mb must be a whole number, not True": GOOD.format(name="x") + "isolation: {memory_mb: true}",
    "network declared but plugins.allow_network=false": GOOD.format(name="x") + "isolation: {network: true}",
    "version must be a text, not nan": GOOD.format(name="x").replace("1.0", ".nan"),
    "name must be a text, not {'a': 1}": GOOD.format(name="{a: 1}"),
    "malformed manifest: it is not UTF-8": b"name: \xff",
    "malformed manifest: it is no mapping": "- a\n- b",
    "malformed manifest: it uses aliases": "a: &a [1]\nb: [*a, *a]",
    "malformed manifest: it is larger than 65536 bytes": "#" * (10 << 20),
    "malformed manifest: a key is given twice": GOOD.format(name="x") + "name: y",
    "malformed manifest: while parsing": "name: [",
    "malformed manifest: a value cannot be read (KeyError)": "author: !!bool perhaps",
    "malformed manifest: a value cannot be read (AttributeError)": "author: !!timestamp yesterday",
    "malformed manifest: a value cannot be read (ValueError)": "version: " + "9" * 5000,
    "malformed manifest: it is nested more than 8 deep": "[" * 20_000,
    "version must be one printable line": GOOD.format(name="x").replace("1.0", '"1\\x07"'),
    "version must be one printable line of at most 80 characters": GOOD.format(name="x").replace("1.0", "v" * 81),
    "isolation.memory_mb=a number without end exceeds cap 2048": GOOD.format(name="x")
    + f"isolation: {{memory_mb: 0x{'f' * 5000}}}",
    "malformed manifest: could not determine a constructor": "name: !!python/object:os.system x",
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_manifest_is_rejected_alone_with_its_reason(tmp_path: Path, make: Make, reason: str) -> None:
    make()
    bad = make("bad", BAD[reason])
    report = registry(tmp_path).reload()
    assert report.loaded == ("good",)
    assert list(report.rejected) == [bad]
    assert report.rejected[bad].startswith(reason)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4), st.dates(),
    st.sampled_from(["1", "good", 1, [".txt"]]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
KEYS = st.sampled_from(
    ["name", "version", "supported_extensions", "api_version", "author", "required_variables", "isolation"]
)
TEXTS = st.text(alphabet="[]{}&*!|>-?:,#%@`'\"\\ \n\tax1.", max_size=40)
MANIFESTS = st.one_of(
    st.binary(max_size=200),
    TEXTS.map(str.encode),
    TEXTS.map(lambda text: f"{GOOD.format(name='x')}author: {text}".encode()),
    st.dictionaries(KEYS, VALUES).map(lambda data: yaml.safe_dump(data).encode()),
)


@settings(max_examples=max(40, round(1000 * SOAK)))
@given(raw=MANIFESTS)
def test_whatever_stands_in_a_manifest_the_others_are_loaded(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("good", GOOD.format(name="good").encode()), ("other", raw)):
            package = Path(folder) / name
            package.mkdir()
            (package / "manifest.yml").write_bytes(content)
            (package / "__init__.py").touch()
        report = PluginRegistry(Path(folder)).reload()
        assert "good" in report.loaded
        assert len(report.loaded) + len(report.rejected) == 2
        assert all(reason.isprintable() for reason in report.rejected.values())


def test_other_packages_that_cannot_be_taken(tmp_path: Path, make: Make) -> None:
    good = make()
    make("json")
    make("no_code", code=False)
    make("second", GOOD.format(name="good"))
    (tmp_path / "bundled" / "empty").mkdir()
    (tmp_path / "bundled" / "linked").symlink_to(good)
    linked = make("linked_manifest")
    (linked / "manifest.yml").unlink()
    (linked / "manifest.yml").symlink_to(good / "manifest.yml")
    folder = make("manifest_folder")
    (folder / "manifest.yml").unlink()
    (folder / "manifest.yml").mkdir()
    report = registry(tmp_path).reload()
    assert report.loaded == ("good",)
    assert {package.name: reason for package, reason in report.rejected.items()} == {
        "json": "its folder 'json' is named like a module of the standard library",
        "no_code": "missing __init__.py",
        "second": "duplicate name 'good': good has it already",
        "empty": "missing manifest.yml",
        "linked": "malformed manifest: its folder is a symbolic link",
        "linked_manifest": "malformed manifest: it cannot be opened (Too many levels of symbolic links)",
        "manifest_folder": "malformed manifest: it is no regular file",
    }


def test_a_plugin_of_the_laboratory_replaces_the_bundled_one_unless_it_is_rejected(tmp_path: Path, make: Make) -> None:
    bundled = [make("one"), make("two")]
    lab = make("one", root="lab")
    make("two", "name: two", root="lab")
    found = registry(tmp_path)
    assert [record.package_path for record in found.list_all()] == [lab, bundled[1]]
    assert found.get("one") == found.get_record("one")
    assert found.get("ghost") is None


def test_reload_reads_anew(tmp_path: Path, make: Make) -> None:
    found = registry(tmp_path)
    assert found.list_all() == []
    make()
    assert found.reload().loaded == ("good",)
    record = found.get("good")
    assert record is not None
    assert (record.version, record.timeout_seconds, record.memory_mb) == ("1.0", 30, 512)


def test_the_network_is_for_those_whose_operator_allows_it(tmp_path: Path, make: Make) -> None:
    make("net", GOOD.format(name="net") + "isolation: {network: true, timeout_seconds: 0, memory_mb: -5}")
    (record,) = registry(tmp_path, allow_network=True).list_all()
    assert (record.network, record.timeout_seconds, record.memory_mb) == (True, 1, 1)


def test_candidates_are_named_with_their_files(tmp_path: Path, make: Make) -> None:
    make("text")
    make("make", GOOD.format(name="make").replace("[.txt]", "[Makefile, .mk]"))
    found = registry(tmp_path)
    assert found.candidates_for(["a/b.TXT", "makefile", "c.py", Path("x.tar.txt")]) == {
        "make": ("makefile",),
        "text": ("a/b.TXT", "x.tar.txt"),
    }
