"""`tq`, the one command of all three distributions.

Each distribution names its subcommands in the entry-point group `turboquant.commands`: a function that typer
can wrap, or a `typer.Typer`. Only the subcommand that is called is imported, so `tq formats` needs no torch
and a distribution that cannot be imported breaks nothing but its own commands; `tq --help` imports all.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from turboquant_kernels.formats import FORMAT_NAMES, HEAD_DIMS, KVFormat, tier_of

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
    """List every KV format with its bytes per token and KV head."""
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "key_bits": fmt.key_bits,
            "value_bits": fmt.value_bits,
            "bytes_per_token_per_head": fmt.slot_bytes(head_dim),
            "ratio_to_bf16": round(fmt.ratio_to_bf16(head_dim), 3),
            "tier": tier_of(fmt),
        }
        for name in FORMAT_NAMES
        for fmt in [KVFormat.parse(name)]
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(title=f"KV formats, head_dim {head_dim}")
    table.add_column("name")
    for header in ("key bits", "value bits", "bytes", "x bf16"):
        table.add_column(header, justify="right")
    table.add_column("tier")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["key_bits"]),
            str(row["value_bits"]),
            str(row["bytes_per_token_per_head"]),
            f"{row['ratio_to_bf16']:.2f}",
            row["tier"] or "",
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
