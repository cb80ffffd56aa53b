"""Denies, or demands, what a pattern finds in a field; linear in the text whatever the pattern."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from plm_engine_core.control_plane.admission.evaluators.evaluator import EvaluatorResult, Examined
from plm_engine_core.control_plane.admission.evaluators.values import Found, LooksAt, TooLarge, check_field, texts_in
from plm_engine_core.control_plane.documents import Flag
from plm_engine_core.control_plane.matching import Match, matcher
from plm_engine_core.control_plane.policy import Facts, Proposed
from plm_engine_core.control_plane.policy.fields import MISSING, FieldPath


class RegexConfig(BaseModel):
    """`patterns` are searched for in every text and number within `field`, case ignored.

    With `deny_on_match` (the default) finding one denies; without, each text must have one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patterns: Annotated[tuple[str, ...], Field(min_length=1)]
    field: FieldPath = "resource"
    deny_on_match: Flag = True

    _path_known = field_validator("field")(check_field)


class RegexEvaluator:
    """Kind `regex`."""

    kind: ClassVar[str] = "regex"
    config_schema: ClassVar[type[BaseModel]] = RegexConfig

    def __init__(self, config: RegexConfig) -> None:
        self._config = config
        self._field = LooksAt(config)
        self._searches = [matcher(pattern, Match.REGEX, anywhere=True) for pattern in config.patterns]

    def evaluate(self, proposal: Proposed, facts: Facts) -> EvaluatorResult:
        """Search; a text that cannot be searched denies."""
        return self._searched(self._field.of_call(proposal, facts))

    def examine(self, examined: Examined) -> EvaluatorResult:
        """The same for another phase."""
        return self._searched(self._field.of(examined, whole=True))

    def _searched(self, found: Found | None) -> EvaluatorResult:
        if found is None:
            return EvaluatorResult(allow=True)
        name, value = found
        try:
            texts = [] if value is MISSING else list(texts_in(value))
        except TooLarge as error:
            return EvaluatorResult(allow=False, reason=f"{name} cannot be searched: {error}")
        for text in texts:
            answers = [search(text) for search in self._searches]
            if None in answers:
                return EvaluatorResult(allow=False, reason=f"{name} holds a text that cannot be searched")
            if any(answers) is self._config.deny_on_match:
                words = "matches" if self._config.deny_on_match else "matches none of the patterns"
                which = f" pattern {answers.index(True) + 1}" if self._config.deny_on_match else ""
                return EvaluatorResult(allow=False, reason=f"{name} {words}{which}")
        if not texts and not self._config.deny_on_match:
            return EvaluatorResult(allow=False, reason=f"{name} is missing or holds no text")
        return EvaluatorResult(allow=True)
