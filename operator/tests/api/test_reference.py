"""docs/api.md: current, and complete."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import turboquant_kernels
import turboquant_operator
from turboquant_operator.api.reference import DOCUMENT, table, with_tables

TEXT = (Path(__file__).parents[3] / DOCUMENT).read_text()
SOURCES = [Path(turboquant_operator.__file__).parent, Path(turboquant_kernels.__file__).parent]
GIVES_REASON = {"set": 2, "refused": 0, "unfit": 0, "unknown": 0, "Problem": 0, "CheckpointError": 0}
"""Functions that make conditions, and the place of the reason among their arguments."""


def test_tables_are_current() -> None:
    assert with_tables(TEXT) == TEXT, "run `make generate`"


def test_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the lines"):
        with_tables("# API\n")


def test_row_tells_type_limits_default_and_duty() -> None:
    schema = {
        "properties": {
            "port": {"type": "integer", "minimum": 1, "maximum": 9, "default": 8, "description": "A | B"},
            "names": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["names"],
    }
    assert table("spec", schema).splitlines()[2:] == [
        "| `spec.port` | integer, 1 to 9 | `8` | A \\| B |",
        "| `spec.names` | list: string | required |  |",
    ]


def reasons() -> Iterator[str]:
    """Every reason that is written out where a condition is made."""
    for file in (path for folder in SOURCES for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                place = GIVES_REASON.get(name, len(node.args))
                for argument in node.args[place : place + 1]:
                    if isinstance(argument, ast.Constant) and re.fullmatch(
                        "[A-Z][A-Za-z]+", str(argument.value)
                    ):
                        yield argument.value


def test_every_reason_is_explained() -> None:
    found = set(reasons())
    assert "UnsupportedModelSource" in found
    assert {reason for reason in found if f"`{reason}`" not in TEXT} == set()


def test_reasons_of_the_table_of_invalid_objects_are_explained() -> None:
    admitted = yaml.safe_load((Path(__file__).parent / "invalid_objects.yaml").read_text())["admitted"]
    assert {case["reason"] for case in admitted.values() if f"`{case['reason']}`" not in TEXT} == set()
