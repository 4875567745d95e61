"""Processors around a model: `batch -> preprocessors -> model -> postprocessors -> loss`."""

from ditty_di.batch import Context
from ditty_di.contracts.check import Report, examine
from ditty_di.contracts.grammar import Contract, ContractError
from ditty_di.contracts.stages import Stage, contract_of, pipeline
from ditty_di.processors.base import PostProcessor, PreProcessor
from ditty_di.processors.keep_input import KeepInput
from ditty_di.processors.pooling import Pooling
from ditty_di.processors.teacher import Teacher
from ditty_di.processors.workflow import Processors

__all__ = [
    "Context",
    "Contract",
    "ContractError",
    "KeepInput",
    "Pooling",
    "PostProcessor",
    "PreProcessor",
    "Processors",
    "Report",
    "Stage",
    "Teacher",
    "contract_of",
    "examine",
    "pipeline",
]
