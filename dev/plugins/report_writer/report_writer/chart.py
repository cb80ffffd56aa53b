"""The chart: what the bill is made of, and what was found in it."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from report_writer.content import SEVERITIES, Content

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"high": "#b3261e", "medium": "#e08600", "low": "#8a94a6"}
_BAR = "#33658a"
_INK = "#1d2433"
_WORDS = {
    "copyleft-network": "network copyleft",
    "copyleft-strong": "strong copyleft",
    "copyleft-weak": "weak copyleft",
}


def draw_chart(content: Content, cache_dir: Path) -> bytes:
    """Return the chart as PNG. Matplotlib keeps its font list in ``cache_dir``; making it takes a second, once."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    os.environ["MPLCONFIGDIR"] = str(cache_dir)  # read by the first import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = Counter(finding.kind for finding in content.findings)
    height = 1.4 + 0.36 * max(len(content.families), len(kinds), 2)
    figure = Figure(figsize=(11, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _families(left, content.families)
    _findings(right, content, [kind for kind, _ in kinds.most_common()])
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _families(axes: Axes, families: dict[str, int]) -> None:
    bars = axes.barh(list(map(_words, families)), list(families.values()), color=_BAR, height=0.68)
    axes.bar_label(bars, padding=4, color=_INK, fontsize=9)
    _style(axes, "Components by license family")


def _findings(axes: Axes, content: Content, kinds: list[str]) -> None:
    counted = Counter((finding.kind, finding.severity) for finding in content.findings)
    start = [0] * len(kinds)
    for severity in SEVERITIES:
        lengths = [counted[kind, severity] for kind in kinds]
        bars = axes.barh(
            list(map(_words, kinds)), lengths, left=start, color=COLORS[severity], height=0.68, label=severity
        )
        labels = [str(length) if length else "" for length in lengths]
        axes.bar_label(bars, labels=labels, label_type="center", color="white", fontsize=9)
        start = [a + b for a, b in zip(start, lengths, strict=True)]
    _style(axes, "Findings by kind")
    if kinds:
        axes.set_xlim(0, 1.05 * max(start))
        axes.legend(frameon=False, fontsize=9, loc="lower right")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0, labelsize=9.5, labelcolor=_INK)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def _words(label: str) -> str:
    return _WORDS.get(label, label.replace("-", " "))
