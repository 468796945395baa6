"""What the planner answers when there is no plan: a condition, not an exception.

`read_facts` and `make_plan` return it; the reconcile copies it into `status.conditions`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NoPlan:
    """The condition that explains why there is no plan."""

    type: Literal["Accepted", "PlanFits"]
    """Accepted: the object asks for what cannot be served at all. PlanFits: memory or facts are missing."""
    status: Literal["False", "Unknown"]
    reason: str
    """CamelCase, stable: InsufficientMemory, UnknownArchitecture, UnsupportedAttention, ..."""
    message: str
    """A sentence for the user, with the way out."""


def refused(reason: str, message: str) -> NoPlan:
    """Accepted=False: no amount of memory or waiting helps; the object must change."""
    return NoPlan("Accepted", "False", reason, message)


def unfit(reason: str, message: str) -> NoPlan:
    """PlanFits=False: the facts are known and the asked capacity does not fit."""
    return NoPlan("PlanFits", "False", reason, message)


def unknown(reason: str, message: str) -> NoPlan:
    """PlanFits=Unknown: a fact is missing; the planner never guesses one."""
    return NoPlan("PlanFits", "Unknown", reason, message)
