"""The process of one engine: what it predicts for texts, which codes it returns, how it continues prompts.

The only module of the evaluation that imports vLLM, and only in a process of its own. The engine runs inside
that process (no engine-core process), so that logits can be taken from the model as they are computed. The
reference engine writes the log-probabilities of every scored position to a file for each text; each other
engine reads them back chunk by chunk and keeps its KL alone.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from turboquant_runtime.bench.engine import installed_versions
from turboquant_runtime.eval.metrics import Array, Mask, divergence
from turboquant_runtime.eval.process import Say
from turboquant_runtime.eval.results import EngineRun, Measured
from turboquant_runtime.eval.workload import GREEDY_TOKENS, Text, Workload

CODE_TOKENS = 6
"""Enough for a space and four digits that are tokens of their own."""

MAX_SEQUENCES = 16

ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1"}
CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # GiB. Without it vLLM takes most of the machine's memory for the cache.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM compiles small functions even where `enforce_eager` is set, which takes longer than calling them.
    "TORCHDYNAMO_DISABLE": "1",
}
"""Of the process, before it imports vLLM; values that the user has set are kept."""


@dataclass(frozen=True)
class Task:
    """An engine, its workload, and the folder of the reference's log-probabilities."""

    run: EngineRun
    workload: Workload
    folder: Path


def measure(task: Task, say: Say) -> Measured:
    """Starts the engine and measures everything; says what is done next."""
    say("start")
    import torch

    defaults = ENVIRONMENT if torch.cuda.is_available() else ENVIRONMENT | CPU_ENVIRONMENT
    os.environ.update(defaults | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    from vllm import LLM
    from vllm.platforms import current_platform

    llm = LLM(
        model=task.run.model,
        kv_cache_dtype=task.run.cache,
        max_num_batched_tokens=task.run.chunk_tokens,
        max_model_len=task.workload.longest_tokens,
        max_num_seqs=MAX_SEQUENCES,
        enable_prefix_caching=True,
        language_model_only=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        gpu_memory_utilization=0.8,  # logits of a chunk are kept and compared outside of what vLLM counts
        seed=0,
    )
    kl, top1 = [], []
    for index, text in enumerate(task.workload.texts):
        say(text.name)
        path = task.folder / f"{index}.float32"
        if task.run.is_reference:
            write_reference(llm, text, path)
        else:
            distances, agreeing = compare(llm, text, path)
            kl.append(distances)
            top1.append(agreeing)
    say("codes")
    prompts = [code.prompt for code in task.workload.codes]
    # The first one stores the context, which the others find in the prefix cache.
    completions = [
        output.text for part in (prompts[:1], prompts[1:]) for output in _generate(llm, part, CODE_TOKENS)
    ]
    say("greedy")
    greedy = [list(output.token_ids) for output in _generate(llm, task.workload.prompts, GREEDY_TOKENS)]
    return Measured(
        device=current_platform.get_device_name(),
        device_type=current_platform.device_type,
        versions=installed_versions(),
        head_dim=llm.llm_engine.model_config.get_head_size(),
        completions=completions,
        greedy=greedy,
        kl=kl,
        top1=top1,
    )


def write_reference(llm: Any, text: Text, path: Path) -> None:
    """Writes log-probabilities of the scored positions, float32 [scored, vocabulary], chunk by chunk."""
    with path.open("wb") as file:

        def take(start: int, logits: Any) -> None:
            file.write(logits.log_softmax(-1).cpu().numpy().tobytes())

        _each_chunk(llm, text, take)


def compare(llm: Any, text: Text, path: Path) -> tuple[Array, Mask]:
    """KL from the reference in `path`, nats, and whether the most likely token is the same: [scored] each."""
    import torch

    reference = numpy.memmap(path, numpy.float32, "r").reshape(len(text.scored), -1)
    kl: list[Array] = []
    top1: list[Mask] = []

    def take(start: int, logits: Any) -> None:
        rows = torch.from_numpy(numpy.array(reference[start : start + len(logits)])).to(logits.device)
        kl.append(divergence(rows, logits.log_softmax(-1)).cpu().numpy())
        top1.append((rows.argmax(-1) == logits.argmax(-1)).cpu().numpy())

    _each_chunk(llm, text, take)
    return numpy.concatenate(kl), numpy.concatenate(top1)


def _each_chunk(llm: Any, text: Text, take: Callable[[int, Any], None]) -> None:
    """Computes the text as a prompt; `take(start, logits)` gets each chunk's scored rows, float32
    [rows, vocabulary], the first of which is row `start` of `text.scored`.

    After each chunk vLLM computes one row to sample from, and, where a request asks for the log-probabilities
    of its prompt, the rows of the chunk's tokens; both of its model runners do so, the second with the text's
    last token and the first without. Such a request does not read the prefix cache.
    Raises RuntimeError if that is not what was seen, and ValueError for logits that are not numbers.
    """
    (model,) = llm.apply_model(lambda model: model)
    compute, position = model.compute_logits, 0

    def tap(hidden_states: Any, *args: Any) -> Any:
        nonlocal position
        logits = compute(hidden_states, *args)
        if len(logits) > 1:
            begin = max(text.scored.start - position, 0)
            rows = logits[begin : text.scored.stop - position].float()
            if rows.isnan().any():
                raise ValueError(f"{text.name}: logits are not numbers in the chunk of position {position}")
            if len(rows):
                take(position + begin - text.scored.start, rows)
            position += len(logits)
        return logits

    model.compute_logits = tap
    try:
        _generate(llm, [text.tokens], 1, prompt_logprobs=0)
    finally:
        model.compute_logits = compute
    if position not in (len(text.tokens) - 1, len(text.tokens)):
        raise RuntimeError(
            f"{text.name}: vLLM computed {position} rows of logits of {len(text.tokens)} tokens"
        )


def _generate(llm: Any, prompts: Any, tokens: int, **sampling: Any) -> list[Any]:
    """Greedy continuations of token ids: vLLM's CompletionOutput each."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **sampling),
        use_tqdm=False,
    )
    return [output.outputs[0] for output in outputs]
