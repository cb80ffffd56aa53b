"""The tutorial on file plugins does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "file-pass.md"


def test_the_tutorial_works_as_it_is_written(tmp_path: Path) -> None:
    manifest, code, script, output = re.findall(r"```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    package = tmp_path / "plugins" / "tidy"
    package.mkdir(parents=True)
    (package / "manifest.yml").write_text(manifest, encoding="utf-8")
    (package / "__init__.py").write_text(code, encoding="utf-8")
    (tmp_path / "run.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == output
    assert '"message": "tidied"' in (tmp_path / "logs/plugins/tidy/project.stderr").read_text(encoding="utf-8")
