"""The numbers of an evaluation, from log-probabilities, KL per position, and tokens. No vLLM."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
import numpy.typing

if TYPE_CHECKING:
    import torch

Array = numpy.typing.NDArray[numpy.float32]
Mask = numpy.typing.NDArray[numpy.bool_]

FAR_SHARE = 0.1
"""Of the scored positions, those whose prediction needs what lies far before them most."""


def divergence(reference: "torch.Tensor", logprobs: "torch.Tensor") -> "torch.Tensor":
    """KL(reference || logprobs) of each row, nats, float32 [rows], of log-probabilities [rows, vocabulary].

    A token that the reference excludes (-inf) adds nothing.
    """
    terms = reference.exp() * (reference - logprobs)
    return terms.where(~reference.isneginf(), 0.0).sum(-1)


def far_positions(dependence: Sequence[Array]) -> list[Mask]:
    """The `FAR_SHARE` of all scored positions with the largest dependence; shapes as given, a text each.

    `dependence` is the KL, nats, between a model and itself where queries see near tokens only.
    """
    flat = numpy.concatenate(dependence)
    chosen = numpy.zeros(len(flat), bool)
    chosen[numpy.argsort(-flat, kind="stable")[: max(1, round(FAR_SHARE * len(flat)))]] = True
    ends = numpy.cumsum([len(text) for text in dependence])[:-1]
    return numpy.split(chosen, ends)


def agreeing_tokens(expected: Sequence[int], got: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(expected, got, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(expected))
