"""What is done to a model, as data: recipes, their stages, and how much is learned."""

from qnpu_jax.recipes.named import METHODS, RECIPES, load_effort, load_recipe
from qnpu_jax.recipes.recipe import EFFORTS, GROUPS, Effort, Ranges, Recipe, Stage

__all__ = [
    "EFFORTS",
    "GROUPS",
    "METHODS",
    "RECIPES",
    "Effort",
    "Ranges",
    "Recipe",
    "Stage",
    "load_effort",
    "load_recipe",
]
