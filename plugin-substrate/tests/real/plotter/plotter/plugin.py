"""Draws lines with axes, a title and a legend."""

from __future__ import annotations

import io
import sys
from typing import Any

import matplotlib as mpl
import pydantic
from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import OutputFile, PluginInterface, plugin_action

mpl.use("Agg")

from matplotlib.figure import Figure


class Chart(pydantic.BaseModel):
    """What is drawn; `validator` and `Config` are as pydantic 1 has them."""

    title: str
    x: list[float]
    lines: dict[str, list[float]]

    class Config:
        extra = "forbid"

    @pydantic.validator("lines")
    def _lengths_agree(cls, lines: dict[str, list[float]], values: dict[str, Any]) -> dict[str, list[float]]:  # noqa: N805
        for name, line in lines.items():
            if len(line) != len(values.get("x", line)):
                raise ValueError(f"line {name!r} has {len(line)} points")
        return lines


class Plotter(PluginInterface):
    name = "plotter"
    version = "1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        self._config = config

    def get_config_schema(self) -> dict[str, Any]:
        return {}

    def get_current_config(self) -> dict[str, Any]:
        return self._config

    def execute(self, action: str, **arguments: Any) -> Any:
        return self.run_action(action, **arguments)

    @plugin_action("plot.about")
    def about(self) -> dict[str, str]:
        return {
            "python": sys.version.split()[0],
            "pydantic": str(pydantic.VERSION),
            "matplotlib": mpl.__version__,
            "cache": mpl.get_cachedir(),
        }

    @plugin_action("plot.lines")
    def lines(self, **described: Any) -> OutputFile:
        try:
            chart = Chart.parse_obj(described)
        except pydantic.ValidationError as error:
            raise PluginInputError(str(error), fields_invalid=["lines"]) from error
        figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
        axes = figure.subplots()
        for name, line in chart.lines.items():
            axes.plot(chart.x, line, label=name)
        axes.set_title(chart.title)
        axes.legend()
        image = io.BytesIO()
        figure.savefig(image, format="png")
        return OutputFile("chart.png", "image/png", image.getvalue())
