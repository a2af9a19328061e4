"""Which tensor gets how many bits: the least KL within a budget of time or size."""

from qnpu_jax.plan.bench import Bench, Point
from qnpu_jax.plan.charges import Charged, Mixed, charges, divergences, mixed
from qnpu_jax.plan.costs import Cost, cost
from qnpu_jax.plan.groups import Choices, Group, choices
from qnpu_jax.plan.model_ties import ties
from qnpu_jax.plan.pairs import Losses, Pair, pair_terms, significant
from qnpu_jax.plan.policies import POLICIES, UNIFORM, Exceeded, Policy
from qnpu_jax.plan.request import Origin, PlanRequest, origin
from qnpu_jax.plan.run import Plan, ends, exceptions, plan, write_plan
from qnpu_jax.plan.solver import Budget, Near, solve
from qnpu_jax.plan.suggest import Priced, Suggested, Suggestion, priced, suggested

__all__ = [
    "POLICIES",
    "UNIFORM",
    "Bench",
    "Budget",
    "Charged",
    "Choices",
    "Cost",
    "Exceeded",
    "Group",
    "Losses",
    "Mixed",
    "Near",
    "Origin",
    "Pair",
    "Plan",
    "PlanRequest",
    "Point",
    "Policy",
    "Priced",
    "Suggested",
    "Suggestion",
    "charges",
    "choices",
    "cost",
    "divergences",
    "ends",
    "exceptions",
    "mixed",
    "origin",
    "pair_terms",
    "plan",
    "priced",
    "significant",
    "solve",
    "suggested",
    "ties",
    "write_plan",
]
