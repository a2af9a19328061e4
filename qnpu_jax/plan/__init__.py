"""Which tensor gets how many bits: the least KL within a budget of time or size."""

from qnpu_jax.plan.charges import Charged, Mixed, charges, divergences, mixed
from qnpu_jax.plan.costs import Cost, cost
from qnpu_jax.plan.groups import Choices, Group, choices
from qnpu_jax.plan.model_ties import ties
from qnpu_jax.plan.run import Plan, PlanRequest, Point, plan, write_plan
from qnpu_jax.plan.solver import Budget, Near, solve
from qnpu_jax.plan.suggest import Priced, Suggested, Suggestion, priced, suggested

__all__ = [
    "Budget",
    "Charged",
    "Choices",
    "Cost",
    "Group",
    "Mixed",
    "Near",
    "Plan",
    "PlanRequest",
    "Point",
    "Priced",
    "Suggested",
    "Suggestion",
    "charges",
    "choices",
    "cost",
    "divergences",
    "mixed",
    "plan",
    "priced",
    "solve",
    "suggested",
    "ties",
    "write_plan",
]
