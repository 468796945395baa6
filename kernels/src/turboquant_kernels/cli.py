"""`tq`, the one command of all three distributions.

Each distribution names its subcommands in the entry-point group `turboquant.commands`: a function that typer
can wrap, or a `typer.Typer`. Only the subcommand that is called is imported, so `tq formats` needs no torch
and a distribution that cannot be imported breaks nothing but its own commands; `tq --help` imports all.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from turboquant_kernels.formats import FORMAT_NAMES, HEAD_DIMS, TIER_NAMES, TIERS, base_format
from turboquant_kernels.plans import KVPlan

COMMAND_GROUP = "turboquant.commands"


def main() -> None:
    """The console script."""
    app(sys.argv[1:], entry_points(group=COMMAND_GROUP))(prog_name="tq")


def app(arguments: Sequence[str], commands: Iterable[EntryPoint]) -> typer.Typer:
    """The application for one call: with the command that `arguments` name, or all where they name none."""
    by_name = {entry.name: entry for entry in commands}
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    chosen = [by_name[named]] if named in by_name else by_name.values()
    result = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
    result.callback(help="TurboQuant: a compressed key-value cache for large language models.")(_nothing)
    add_commands(result, chosen)
    return result


def add_commands(application: typer.Typer, commands: Iterable[EntryPoint]) -> None:
    """Adds the command of each entry point, by name; one that cannot be imported says so when called."""
    for entry in sorted(commands, key=lambda entry: entry.name):
        try:
            command = entry.load()
        except Exception as error:  # whatever a broken distribution raises must not reach the others
            application.command(entry.name, help=f"(cannot be imported: {error})", **_ANY_ARGUMENTS)(
                _unavailable(entry, error)
            )
            continue
        if isinstance(command, typer.Typer):
            application.add_typer(command, name=entry.name)
        else:
            application.command(entry.name)(command)


_ANY_ARGUMENTS: dict[str, Any] = {
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True}
}


def _nothing() -> None:
    """A callback keeps typer from running a lone command without its name."""


def _unavailable(entry: EntryPoint, error: Exception) -> Callable[[], None]:
    owner = entry.dist.name if entry.dist else entry.value

    def report() -> None:
        typer.echo(
            f"tq {entry.name}: {owner} cannot be imported: {type(error).__name__}: {error}".splitlines()[0],
            err=True,
        )
        raise typer.Exit(1)

    return report


def _check_head_dim(head_dim: int) -> int:
    if head_dim not in HEAD_DIMS:
        raise typer.BadParameter(f"{head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    return head_dim


HeadDim = Annotated[int, typer.Option(help="Head dimension of the model.", callback=_check_head_dim)]


def formats(
    head_dim: HeadDim = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every KV format and tier with its bytes per token and KV head; a tier's key bits are a mean."""
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "key_bits": fmt.key_bits,
            "value_bits": fmt.value_bits,
            "bytes_per_token_per_head": fmt.slot_bytes(head_dim),
            "ratio_to_bf16": round(fmt.ratio_to_bf16(head_dim), 3),
        }
        for name in (*TIER_NAMES, *FORMAT_NAMES)
        for fmt in [base_format(name)]
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(title=f"KV formats, head_dim {head_dim}")
    table.add_column("name")
    for header in ("key bits", "value bits", "bytes", "x bf16"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["key_bits"]),
            str(row["value_bits"]),
            str(row["bytes_per_token_per_head"]),
            f"{row['ratio_to_bf16']:.2f}",
        )
    Console().print(table)


def validate(
    head_dim: HeadDim = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the paper's claims with this codec: distortion, inner product, bias. Exit code 1: one fails."""
    try:
        from turboquant_kernels.validation import claims
    except ModuleNotFoundError as error:
        typer.echo(f"tq validate: {error}; install turboquant-kernels[torch]", err=True)
        raise typer.Exit(1) from error
    progress = track(claims(head_dim), "measuring", console=Console(stderr=True), transient=True)
    checks = [claim() for claim in progress]
    if as_json:
        typer.echo(json.dumps([check.to_dict() for check in checks], indent=2))
    else:
        table = Table(title=f"Claims of arXiv 2504.19874, head_dim {head_dim}")
        table.add_column("claim", no_wrap=True)
        for header in ("at least", "measured", "at most", "paper"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("")
        for check in checks:
            numbers = (check.lower, check.measured, check.upper, check.paper)
            table.add_row(
                check.claim,
                *("" if number is None else f"{number:.3g}" for number in numbers),
                "ok" if check.passed else "[red]fails[/red]",
            )
        Console().print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


def _check_tier(name: str) -> str:
    tier = name.removeprefix("tq-")
    if tier not in TIERS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(TIERS)}")
    return tier


def allocate(
    model: Annotated[str, typer.Argument(help="Model folder, or hub model (org/name).")],
    tier: Annotated[str, typer.Option(help=f"{', '.join(TIERS)}.", callback=_check_tier)] = "balanced",
    skip_layers: Annotated[
        list[int] | None, typer.Option("--skip-layer", min=0, help="Keeps its own dtype; repeatable.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a hub model.")] = "",
    device: Annotated[
        str, typer.Option(help="cuda or cpu, where the engine runs: it stores key anchors on cpu alone.")
    ] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print the KV plan alone, as JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the bits of each layer here.")] = None,
) -> None:
    """Deal a tier's key bits to a model's layers, as the engine does at start. Exit code 2: bad input."""
    try:
        from turboquant_kernels import allocation
        from turboquant_kernels.tensors import Tensors
    except ModuleNotFoundError as error:
        _refuse_to_allocate(f"{error}; install turboquant-kernels[torch]")
    from turboquant_kernels.checkpoint import CheckpointError, read_folder, read_hub

    folder = Path(model).expanduser()
    try:
        if folder.is_dir():
            config, tensors = read_folder(folder).config, Tensors.of_folder(folder)
        else:
            repository = model.removeprefix("hf://")
            found = read_hub(repository, revision)
            config, tensors = found.config, Tensors.of_hub(repository, found.revision)
        dealt = allocation.allocate(TIERS[tier].on(device), tensors, config, skip_layers or ())
    except (allocation.AllocationError, CheckpointError, OSError) as error:
        _refuse_to_allocate(str(error))
    title = f"{TIERS[tier].cache_dtype} of {folder.name}"
    if picture is not None:
        try:
            _draw_bits(dealt, title, picture)
        except ModuleNotFoundError as error:
            _refuse_to_allocate(f"--picture: {error}; install turboquant-kernels[bench]")
        except (OSError, ValueError) as error:
            _refuse_to_allocate(f"--picture {picture}: {error}")
    if as_json:
        typer.echo(json.dumps(dealt.to_dict(), indent=1))
        return
    table = Table(title=title, title_justify="left")
    for header in ("layer", "key bits", "value bits"):
        table.add_column(header, justify="right")
    table.add_column("")
    for index, layer in enumerate(dealt.layers):
        table.add_row(str(index), str(layer.key_bits), str(layer.value_bits), "#" * layer.key_bits)
    Console().print(table)


def _refuse_to_allocate(reason: str) -> NoReturn:
    typer.echo(f"tq allocate: {reason}", err=True)
    raise typer.Exit(2)


def _draw_bits(plan: KVPlan, title: str, path: Path) -> None:
    """An svg or png with a bar for each layer: key bits up, value bits down."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bits"  # the same plan gives the same bytes
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 2.8))
    layers = range(len(plan.layers))
    axis.bar(layers, [layer.key_bits for layer in plan.layers], color="#0b6e6e", label="key")
    axis.bar(layers, [-layer.value_bits for layer in plan.layers], color="#b8b8b8", label="value")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title=title, xlabel="layer", ylabel="bits a number")
    axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
    axis.legend(loc="upper right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
