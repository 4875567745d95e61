"""Plan memory, operations, traffic and time of a training on any layout, without its devices."""

from ditty_di.planning.device import Device
from ditty_di.planning.planner import Plan, plan
from ditty_di.planning.rank import RankPlan
from ditty_di.planning.recipe import Recipe

__all__ = ["Device", "Plan", "RankPlan", "Recipe", "plan"]
