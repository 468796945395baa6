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


def assert_next_to_each_other(
    compressed: Any, plain: Any, prompts: list[list[int]], *, near: float, far: float = 2.5, **arguments: Any
) -> None:
    """Two engines give the same tokens log probabilities that differ by little, in nats.

    By at most `near` in the median and `far` for 99 of 100: over the prompts' tokens, and over those of the
    answers up to where two part.
    """
    differences = []
    for prompt in prompts:
        outputs = [
            engine.generate([prompt], 16, logprobs=0, prompt_logprobs=0, **arguments)[0]
            for engine in (compressed, plain)
        ]
        told = [[next(iter(step.values())).logprob for step in o.prompt_logprobs[1:]] for o in outputs]
        differences += [abs(a - b) for a, b in zip(*told, strict=True)]
        answers = [o.outputs[0] for o in outputs]
        for a, b, step_a, step_b in zip(
            *(a.token_ids for a in answers), *(a.logprobs for a in answers), strict=True
        ):
            if a != b:
                break  # two continuations that were next to equal
            differences.append(abs(step_a[a].logprob - step_b[b].logprob))
    print(f"{len(differences)} tokens, median {median(differences):.2g}, largest {max(differences):.2g}")
    assert median(differences) <= near
    assert sorted(differences)[len(differences) * 99 // 100] <= far
