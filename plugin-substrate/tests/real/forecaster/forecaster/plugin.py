"""Trains a forest on a table, keeps it in the plugin's folder and predicts with it; solves linear systems with BLAS."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import joblib
import numpy as np
import pydantic
import sklearn
from plugin_substrate.errors import PluginInputError
from plugin_substrate.interface import PluginInterface, plugin_action
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier


class Table(pydantic.BaseModel):
    """What is learned from; `model_validator` is pydantic 2's."""

    features: list[list[float]]
    labels: list[str]

    @pydantic.model_validator(mode="after")
    def _rows_agree(self) -> Table:
        if len(self.features) != len(self.labels):
            raise ValueError(f"{len(self.features)} rows of features, {len(self.labels)} labels")
        return self


class Forecaster(PluginInterface):
    name = "forecaster"
    version = "1.0"

    def initialize(self, config: dict[str, Any]) -> None:
        self._config = config

    def get_config_schema(self) -> dict[str, Any]:
        from forecaster.meta import get_plugin_metadata

        return dict(get_plugin_metadata()["config_schema"])

    def get_current_config(self) -> dict[str, Any]:
        return self._config

    def execute(self, action: str, **arguments: Any) -> Any:
        return self.run_action(action, **arguments)

    @plugin_action("forecast.about")
    def about(self) -> dict[str, str]:
        return {
            "python": sys.version.split()[0],
            "pydantic": pydantic.VERSION,
            "numpy": np.__version__,
            "sklearn": sklearn.__version__,
        }

    @plugin_action("forecast.train")
    def train(self, model: str, features: Any, labels: list[str]) -> dict[str, Any]:
        """Train with threads, as joblib does by default for forests, and keep the model."""
        try:
            table = Table(features=np.asarray(features).tolist(), labels=labels)
        except pydantic.ValidationError as error:
            raise PluginInputError(str(error), fields_invalid=["features", "labels"]) from error
        forest = RandomForestClassifier(n_estimators=self._config["trees"], n_jobs=self._config["jobs"], random_state=0)
        self.report_progress(0.2, "measuring")
        score = cross_val_score(forest, table.features, table.labels, cv=3).mean()
        self.check_cancel()
        self.report_progress(0.6, "training")
        forest.fit(table.features, table.labels)
        joblib.dump(forest, self.data_dir / f"{model}.joblib")
        self.report_usage({"trees": self._config["trees"] * 4})
        return {"score": float(score), "classes": [str(name) for name in forest.classes_]}

    @plugin_action("forecast.predict")
    def predict(self, model: str, features: Any) -> list[str]:
        path = self.data_dir / f"{model}.joblib"
        if not path.is_file():
            raise PluginInputError(f"there is no model {model!r}", fields_invalid=["model"])
        return [str(label) for label in joblib.load(path).predict(np.asarray(features))]

    @plugin_action("forecast.probabilities")
    def probabilities(self, model: str, features: Any) -> Any:
        """Answer an array with a row for each row of the array ``features`` and a column for each class."""
        return joblib.load(self.data_dir / f"{model}.joblib").predict_proba(features)

    @plugin_action("forecast.standardize")
    def standardize(self, table: Any) -> dict[str, Any]:
        """Answer the table with a mean of 0 and a deviation of 1 in each column, and what was taken from it."""
        scaler = StandardScaler().fit(table)
        return {"table": scaler.transform(table).astype(np.float32), "mean": scaler.mean_}

    @plugin_action("forecast.search")
    def search(self, features: Any, labels: list[str], jobs: int) -> dict[str, Any]:
        """Look for the best depth with a pool of processes, where the sandbox allows one; else joblib does without."""
        search = GridSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2, 4]}, cv=3, n_jobs=jobs)
        search.fit(np.asarray(features), labels)
        pids = joblib.Parallel(n_jobs=jobs)(joblib.delayed(os.getpid)() for _ in range(20))
        return {"max_depth": search.best_params_["max_depth"], "other_processes": len({*pids} - {os.getpid()})}

    @plugin_action("forecast.solve")
    def solve(self, size: int, threads: int) -> float:
        """Solve a random system in each of many threads, each with BLAS's own; answer the largest residual."""
        residuals: list[float] = []

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            matrix, right = random.random((size, size)), random.random(size)
            residuals.append(float(np.abs(matrix @ np.linalg.solve(matrix, right) - right).max()))

        started = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        if len(residuals) != threads:
            raise RuntimeError(f"{threads - len(residuals)} threads failed")
        return max(residuals)
