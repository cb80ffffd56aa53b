"""Evaluators: second opinions on a proposal, on what a run is given and on what a call gave back.

They are asked side by side, and only their allowing allows.
"""

from plm_engine_core.control_plane.admission.evaluators.cedar import CedarEvaluator
from plm_engine_core.control_plane.admission.evaluators.evaluator import Evaluator, EvaluatorResult, Examined
from plm_engine_core.control_plane.admission.evaluators.json_schema import JsonSchemaEvaluator
from plm_engine_core.control_plane.admission.evaluators.lists import ListEvaluator
from plm_engine_core.control_plane.admission.evaluators.parallel import Configured, ParallelPolicyEvaluator
from plm_engine_core.control_plane.admission.evaluators.regex import RegexEvaluator
from plm_engine_core.control_plane.admission.evaluators.registry import BUILT_IN, EVALUATORS_GROUP, EvaluatorRegistry

__all__ = [
    "BUILT_IN",
    "EVALUATORS_GROUP",
    "CedarEvaluator",
    "Configured",
    "Evaluator",
    "EvaluatorRegistry",
    "EvaluatorResult",
    "Examined",
    "JsonSchemaEvaluator",
    "ListEvaluator",
    "ParallelPolicyEvaluator",
    "RegexEvaluator",
]
