"""Object graphs: what a Hydra `_target_` configuration builds, checked before anything is built."""

from ditty_di.config.check import Checked, Node
from ditty_di.config.diff import ABSENT, Difference, difference, flatten
from ditty_di.config.early import View
from ditty_di.config.errors import BuildError, ConfigError, Problem
from ditty_di.config.graph import Graph
from ditty_di.config.provenance import Provenance, Setting, provenance

__all__ = [
    "ABSENT",
    "BuildError",
    "Checked",
    "ConfigError",
    "Difference",
    "Graph",
    "Node",
    "Problem",
    "Provenance",
    "Setting",
    "View",
    "difference",
    "flatten",
    "provenance",
]
