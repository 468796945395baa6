"""`tq`: its own commands, and how it finds those of the other distributions."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest
import typer
from typer.testing import CliRunner

from turboquant_kernels import cli
from turboquant_kernels.formats import FORMAT_NAMES, TIER_NAMES
from turboquant_kernels.validation import Check

NAMES = [*TIER_NAMES, *FORMAT_NAMES]

GROUP = cli.COMMAND_GROUP
OWN = [
    EntryPoint("formats", "turboquant_kernels.cli:formats", GROUP),
    EntryPoint("validate", "turboquant_kernels.cli:validate", GROUP),
]
BROKEN = EntryPoint("broken", "no_such_distribution.cli:main", GROUP)


def tq(*arguments, commands=OWN):
    return CliRunner().invoke(cli.app(arguments, commands), arguments)


def test_formats_as_json_lists_every_format():
    rows = json.loads(tq("formats", "--head-dim", "128", "--json").stdout)
    assert [row["name"] for row in rows] == NAMES
    assert rows[NAMES.index("tq-k5v3")] == {
        "name": "tq-k5v3",
        "key_bits": 5,
        "value_bits": 3,
        "bytes_per_token_per_head": 132,
        "ratio_to_bf16": 3.879,
    }
    assert rows[NAMES.index("bf16")]["ratio_to_bf16"] == 1


def test_formats_as_a_table_names_every_format():
    output = tq("formats", "--head-dim", "64").stdout
    assert all(name in output for name in NAMES)


@pytest.mark.parametrize("command", ["formats", "validate"])
def test_a_head_dim_that_does_not_exist_names_those_that_do(command):
    result = tq(command, "--head-dim", "100")
    assert result.exit_code == 2
    assert "64, 80, 96, 128, 192, 256" in result.output
    assert "Traceback" not in result.output


def test_validate_passes_and_reports_every_claim():
    result = tq("validate", "--head-dim", "64", "--json")
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)
    assert all(check["passed"] and check["lower"] <= check["measured"] <= check["upper"] for check in checks)
    assert {check["source"] for check in checks} >= {"theorems 1, 3", "theorems 2, 3", "theorem 2"}


def test_validate_fails_where_a_claim_does(monkeypatch):
    failing = Check("D_mse, 1 bits", measured=0.9, lower=0.25, upper=0.68, paper=0.36, source="theorem 1")
    monkeypatch.setattr("turboquant_kernels.validation.claims", lambda head_dim: [lambda: failing])
    result = tq("validate")
    assert result.exit_code == 1
    assert "fails" in result.output


def test_a_command_that_cannot_be_imported_says_so_in_one_line():
    result = tq("broken", "--any", "argument", commands=[*OWN, BROKEN])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1
    assert "tq broken: no_such_distribution.cli:main cannot be imported: ModuleNotFoundError" in result.output


def test_a_broken_distribution_leaves_the_others_alone():
    assert tq("formats", commands=[*OWN, BROKEN]).exit_code == 0
    helped = tq("--help", commands=[*OWN, BROKEN])
    assert helped.exit_code == 0
    assert all(name in helped.output for name in ("formats", "validate", "broken"))


def test_only_the_named_command_is_imported(tmp_path, monkeypatch):
    (tmp_path / "loud_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    loud = EntryPoint("loud", "loud_module:main", GROUP)
    assert tq("formats", commands=[*OWN, loud]).exit_code == 0


def test_a_typer_app_is_a_command_with_subcommands(tmp_path, monkeypatch):
    nested = typer.Typer()
    nested.command("kernels")(lambda: typer.echo("measured"))
    nested.command("engine")(lambda: None)
    monkeypatch.setattr(cli, "nested_for_test", nested, raising=False)
    bench = EntryPoint("bench", "turboquant_kernels.cli:nested_for_test", GROUP)
    assert tq("bench", "kernels", commands=[*OWN, bench]).stdout == "measured\n"


def test_an_unknown_command_is_refused_without_a_traceback():
    result = tq("fromats")
    assert result.exit_code == 2
    assert "fromats" in result.output


def test_the_distribution_offers_its_commands():
    offered = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    assert offered["formats"] == "turboquant_kernels.cli:formats"
    assert offered["validate"] == "turboquant_kernels.cli:validate"


def test_formats_imports_no_torch():
    code = (
        "import sys; from turboquant_kernels.cli import main; sys.argv = ['tq', 'formats', '--json']\n"
        "try: main()\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout)) == len(NAMES)
