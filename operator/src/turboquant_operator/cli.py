"""`tq plan`: the operator's planner on a laptop, without a cluster.

Prints the object that `status.plan` would hold, or a table with the alternatives and the reasons. Starts in
well under a second: no torch, vLLM, kubernetes or kopf, and the hub's client only for a hub model.
"""

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from turboquant_kernels.checkpoint import CheckpointError
from turboquant_kernels.formats import base_format
from turboquant_operator.api.schema import parse_quantity
from turboquant_operator.api.spec import Architecture, TurboQuantDeploymentSpec
from turboquant_operator.api.status import Plan
from turboquant_operator.model_source import read_model
from turboquant_operator.planner import ModelFacts, NoPlan, make_plan, read_facts
from turboquant_operator.planner.accelerators import CPU, catalogue

DOES_NOT_FIT = 1
BAD_INPUT = 2


def plan(
    model: Annotated[str, typer.Argument(help="config.json, model folder, or hub model (org/name).")],
    accelerator: Annotated[str, typer.Option(help="Catalogue name such as nvidia-h100-80gb, or cpu.")],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one sequence; default: the model's.")
    ] = None,
    concurrent: Annotated[int, typer.Option(min=1, help="Sequences of that length at once.")] = 1,
    kv_format: Annotated[
        str, typer.Option("--format", help="auto, or a name that `tq formats` lists.")
    ] = "auto",
    quality: Annotated[str, typer.Option(help="near-lossless, balanced or max-capacity.")] = "balanced",
    tensor: Annotated[str, typer.Option(help="Tensor-parallel size: auto or a number.")] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="Cache memory per GPU (cpu: in all), such as 8Gi.")
    ] = None,
    weights_bytes: Annotated[int | None, typer.Option(min=1, help="Bytes of the weights.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a hub model.")] = "",
    engine_arg: Annotated[list[str] | None, typer.Option(help="As in spec.engine.args; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print status.plan as JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the capacity of each format here.")] = None,
) -> None:
    """Plan KV format and tensor-parallel size of a model. Exit code: 0 fits, 1 does not fit, 2 bad input."""
    spec = _spec(accelerator, context, concurrent, kv_format, quality, tensor, memory, engine_arg or [])
    try:
        found = read_model(model, revision)
    except CheckpointError as error:
        _bad_input(str(error))
    facts = read_facts(found.config, found.weights, Architecture(weight_bytes=weights_bytes))
    answer = facts if isinstance(facts, NoPlan) else make_plan(spec, facts, revision=found.revision)
    if as_json:
        typer.echo(json.dumps(_document(answer), indent=2))
    elif isinstance(answer, NoPlan):
        typer.echo(f"{answer.type}={answer.status} ({answer.reason})\n{answer.message}")
    elif isinstance(facts, ModelFacts):
        _show(facts, answer, concurrent)
    if isinstance(answer, NoPlan):
        raise typer.Exit(DOES_NOT_FIT)
    if picture is not None:
        _draw(answer, concurrent, picture)


def _spec(
    accelerator: str,
    context: int | None,
    concurrent: int,
    kv_format: str,
    quality: str,
    tensor: str,
    memory: str | None,
    engine_args: list[str],
) -> TurboQuantDeploymentSpec:
    """The object's spec that the options stand for; what they get wrong ends the command."""
    if accelerator != CPU and accelerator not in catalogue():
        _bad_input(f"--accelerator {accelerator!r} is not cpu or one of {', '.join(catalogue())}")
    if accelerator == CPU and memory is None:
        _bad_input("--memory is needed with --accelerator cpu: it is the cache's memory, for example 4Gi")
    if tensor != "auto" and not (tensor.isdigit() and int(tensor)):
        _bad_input(f"--tensor {tensor!r} is neither auto nor a number from 1 on")
    try:
        if kv_format != "auto":
            base_format(kv_format)
        if memory is not None:
            parse_quantity(memory)
        return TurboQuantDeploymentSpec.model_validate(
            {
                "model": {"uri": "hf://planned/offline"},
                "accelerator": {"type": accelerator},
                "capacity": {"contextLength": context, "concurrentSequences": concurrent},
                "kvCache": {"format": kv_format, "quality": quality, "memory": memory},
                "parallelism": {"tensor": tensor if tensor == "auto" else int(tensor)},
                "engine": {"args": engine_args},
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        _bad_input(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except ValueError as error:
        _bad_input(str(error))


def _bad_input(message: str) -> NoReturn:
    typer.echo(f"tq plan: {message}", err=True)
    raise typer.Exit(BAD_INPUT)


def _document(answer: Plan | NoPlan) -> dict[str, object]:
    if isinstance(answer, Plan):
        return answer.model_dump(mode="json", by_alias=True)
    return {
        "type": answer.type,
        "status": answer.status,
        "reason": answer.reason,
        "message": answer.message,
    }


def _draw(chosen: Plan, concurrent: int, path: Path) -> None:
    from turboquant_operator.picture import draw_capacity

    title = f"{chosen.format} on {chosen.accelerator}, tensor-parallel {chosen.tensor_parallel_size}"
    try:
        draw_capacity(chosen, title, concurrent * chosen.context_length, path)
    except ModuleNotFoundError as error:
        _bad_input(f"--picture: {error}; install turboquant-operator[picture]")
    except (OSError, ValueError) as error:
        _bad_input(f"--picture {path}: {error}")


def _show(facts: ModelFacts, chosen: Plan, concurrent: int) -> None:
    console = Console()
    wanted = concurrent * chosen.context_length
    console.print(
        f"[bold]{facts.architecture}[/]: {facts.layers} layers, {facts.key_value_heads} KV heads of "
        f"{facts.head_dim}, {chosen.baseline_kv_bytes_per_token:,} bytes a token in {facts.dtype}"
    )
    table = Table("", "format", "TP", "tokens", f"for {wanted:,}", title=f"Capacity on {chosen.accelerator}")
    for column in table.columns[2:4]:
        column.justify = "right"
    rows = [("→", chosen.format, chosen.tensor_parallel_size, chosen.predicted_tokens, True)]
    rows += [("", o.format, o.tensor_parallel_size, o.predicted_tokens, o.fits) for o in chosen.alternatives]
    for mark, name, tensor, tokens, fits in rows:
        table.add_row(mark, name, str(tensor), f"{tokens:,}", "fits" if fits else "too small")
    console.print(table)
    for reason in chosen.reasons:
        console.print(f"- {reason}")
