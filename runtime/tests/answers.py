"""Comparing what two engines, or one in two situations, answer to the same prompts."""

from statistics import median
from typing import Any


def assert_same_answers(outputs: list[Any], expected: list[Any], *, rounding: float, flip: float) -> None:
    """Log probabilities differ by at most `rounding` in the median and `flip` in all, both in nats.

    Tokens are equal, up to one whose lead was within `flip`: from there on the two continue different texts.
    Outputs are vLLM's, of greedy requests with `logprobs=2`.
    """
    differences = []
    for output, reference in zip(outputs, expected, strict=True):
        for step, other in zip(steps(output), steps(reference), strict=True):
            (token, logprob), (expected_token, expected_logprob), second = step[0], *other
            differences.append(abs(logprob - expected_logprob))
            if token != expected_token:
                lead = expected_logprob - second[1]
                assert lead <= flip, f"token {token} for {expected_token}, which led by {lead:.3f}"
                break
    print(f"{len(differences)} tokens, median {median(differences):.2g}, largest {max(differences):.2g}")
    assert max(differences) <= flip
    assert median(differences) <= rounding


def steps(output: Any) -> list[list[tuple[int, float]]]:
    """The two best tokens of each step with their log probabilities, best first."""
    return [
        sorted(((token, p.logprob) for token, p in step.items()), key=lambda pair: -pair[1])[:2]
        for step in output.outputs[0].logprobs
    ]
