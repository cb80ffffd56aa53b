"""The glossary's struck words appear nowhere in code and documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
KINDS = {".css", ".html", ".js", ".md", ".py", ".sql", ".toml", ".yaml", ".yml"}
SKIPPED = {".git", ".venv", ".state", "build", "dist", "node_modules", "__pycache__"}
EXEMPT = (
    "docs/glossary.md",  # lists them
    "dev/plugins/",  # reads people's files, in people's spelling
    "dev/samples/",
)


def struck_words() -> list[str]:
    table = GLOSSARY.read_text(encoding="utf-8").partition("## Struck")[2]
    rows = re.findall(r"^\| (.+?) \| .+? \|$", table, re.MULTILINE)
    return [word for word in rows if word not in {"not", "---"}]


def pattern(words: list[str]) -> re.Pattern[str]:
    """The words and their plurals, whole, in any case; `_` separates words as a space does."""
    choices = "|".join(re.escape(word).replace(r"\ ", r"[\s_-]+") for word in words)
    return re.compile(rf"(?<![^\W_])(?:{choices})s?(?![^\W_])", re.IGNORECASE)


def found(root: Path, words: list[str]) -> Iterator[str]:
    struck = pattern(words)
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        if path.suffix not in KINDS or SKIPPED.intersection(below.parts) or below.as_posix().startswith(EXEMPT):
            continue
        text = path.read_text(encoding="utf-8")
        for match in struck.finditer(text):
            yield f"{below}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"


def test_no_struck_word_is_used() -> None:
    assert list(found(ROOT, struck_words())) == []


@pytest.mark.parametrize("word", struck_words())
def test_a_struck_word_would_be_noticed_in_any_form(word: str, tmp_path: Path) -> None:
    for number, form in enumerate((word, word.upper(), f"{word}s", f"my_{word.replace(' ', '_')}_id")):
        (tmp_path / f"{number}.py").write_text(f"\n# {form}.\n", encoding="utf-8")
    places = [place.partition(": ")[0] for place in found(tmp_path, struck_words())]
    assert places == [f"{number}.py:2" for number in range(4)]


def test_words_that_only_contain_a_struck_one_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("a skillful licencee", encoding="utf-8")
    assert list(found(tmp_path, struck_words())) == []


def test_every_table_of_the_glossary_is_in_order() -> None:
    tables = re.split(r"^\| --- \| --- \|$", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(tables) == 5
    for table in tables:
        words = re.findall(r"^\| \**([^*|]+?)\**,? ?\*?.*\|$", table.partition("\n\n")[0], re.MULTILINE)
        assert words == sorted(words, key=str.lower), words
