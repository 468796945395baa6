"""From what is known about a model and asked of it to a plan: pure functions, no cluster, no engine.

``facts`` normalises a model's config.json and weight sizes, ``accelerators`` knows the GPUs, ``capacity``
repeats the engine's rule for how many tokens a cache holds, ``memory`` says how much of a GPU is left for
that cache, and ``choice`` puts them together into `status.Plan`, or into a `NoPlan` that says why not.
"""

from turboquant_operator.planner.choice import make_plan
from turboquant_operator.planner.facts import ModelFacts, read_facts
from turboquant_operator.planner.outcome import NoPlan

__all__ = ["ModelFacts", "NoPlan", "make_plan", "read_facts"]
