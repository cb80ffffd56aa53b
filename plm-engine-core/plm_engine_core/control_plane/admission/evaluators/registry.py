"""The kinds of evaluator there are, and how a policy's evaluators are made from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from plm_engine_core.control_plane.admission.evaluators.cedar import CedarEvaluator
from plm_engine_core.control_plane.admission.evaluators.evaluator import Evaluator
from plm_engine_core.control_plane.admission.evaluators.json_schema import JsonSchemaEvaluator
from plm_engine_core.control_plane.admission.evaluators.lists import ListEvaluator
from plm_engine_core.control_plane.admission.evaluators.parallel import Configured, ParallelPolicyEvaluator
from plm_engine_core.control_plane.admission.evaluators.regex import RegexEvaluator
from plm_engine_core.control_plane.admission.evaluators.values import PHASE
from plm_engine_core.control_plane.document_places import place_in
from plm_engine_core.control_plane.documents import problem_of
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import EvaluatorSpec, PolicySnapshot
from plm_engine_core.control_plane.policy.frozen import thawed
from plm_engine_core.control_plane.vocabulary import EvaluationPhase

EVALUATORS_GROUP = "plm.evaluators"
"""Entry points of this group name evaluator classes; the entry point's name is only for messages."""

BUILT_IN: tuple[type[Evaluator], ...] = (CedarEvaluator, JsonSchemaEvaluator, ListEvaluator, RegexEvaluator)


class EvaluatorRegistry:
    """An immutable set of evaluator kinds; whoever needs it is handed it."""

    def __init__(self, kinds: Iterable[type[Evaluator]] = BUILT_IN) -> None:
        self._kinds: dict[str, type[Evaluator]] = {}
        for kind in kinds:
            if kind.kind in self._kinds:
                raise InvalidRequest(f"two evaluators are of kind {kind.kind}; remove one", field="evaluators")
            self._kinds[kind.kind] = kind

    @classmethod
    def installed(cls, *, optional: Collection[str] = ()) -> EvaluatorRegistry:
        """The built-in kinds and those of every installed package.

        Raises:
            InvalidRequest: one cannot be loaded and is not named in `optional`, or two are of one kind.
        """
        kinds = list(BUILT_IN)
        for entry in sorted(entry_points(group=EVALUATORS_GROUP), key=lambda found: found.name):
            try:
                kinds.append(_evaluator_class(entry.load()))
            except Exception as error:
                if entry.name not in optional:
                    words = (
                        f"the evaluator {entry.name} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
                    )
                    raise InvalidRequest(f"{words}; mend or uninstall its package", field="evaluators") from error
        return cls(kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds by name."""
        return tuple(sorted(self._kinds))

    def build(self, policy: PolicySnapshot, *, file: Path | None = None) -> ParallelPolicyEvaluator:
        """The evaluators that a policy declares, configured. `file` is where the policy stands, where it does in one.

        Raises:
            InvalidRequest: a kind is unknown or cannot be asked in the phase, or a configuration is wrong; names the
                evaluator, and its line and column in the file.
        """
        configured: list[Configured] = []
        for index, spec in enumerate(policy.evaluators):
            try:
                configured.append(self._configured(spec))
            except InvalidRequest as error:
                if file is None:
                    raise
                within = error.field.removeprefix(f"evaluators.{spec.name}").strip(".").split(".")
                location = ("evaluators", index, *(int(part) if part.isdecimal() else part for part in within))
                raise InvalidRequest(f"{place_in(file, location)}: {error}", field=error.field) from error
        return ParallelPolicyEvaluator(configured)

    def _configured(self, spec: EvaluatorSpec) -> Configured:
        place = f"evaluators.{spec.name}"
        kind = self._kinds.get(spec.kind)
        if kind is None:
            there = ", ".join(self.kinds)
            raise InvalidRequest(
                f"{place}: no evaluator of kind {spec.kind} is installed; there are {there}", field=place
            )
        if spec.phase is not EvaluationPhase.CALL and not callable(getattr(kind, "examine", None)):
            raise InvalidRequest(
                f"{place}: evaluators of kind {spec.kind} are asked about calls only, not in the phase {spec.phase}; "
                "leave phase out, or choose another kind",
                field=place,
            )
        try:
            evaluator = kind(kind.config_schema.model_validate(thawed(spec.config), context={PHASE: spec.phase}))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([place, "config", *map(str, first["loc"])])
            raise InvalidRequest(f"{where}: {problem_of(first)}; correct it in the policy", field=where) from error
        except ValueError as error:
            raise InvalidRequest(f"{place}.config: {error}", field=f"{place}.config") from error
        return Configured(name=spec.name, evaluator=evaluator, gate=spec.gate, timeout_seconds=spec.timeout_ms / 1000)


def _evaluator_class(loaded: Any) -> type[Evaluator]:
    schema = getattr(loaded, "config_schema", None)
    if not (
        isinstance(loaded, type)
        and isinstance(getattr(loaded, "kind", None), str)
        and isinstance(schema, type)
        and issubclass(schema, BaseModel)
        and callable(getattr(loaded, "evaluate", None))
    ):
        raise TypeError("it is no evaluator class: those have kind, config_schema and evaluate")
    return loaded
