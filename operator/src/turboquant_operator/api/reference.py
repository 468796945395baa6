"""The tables of fields in ``docs/api.md``, generated from the API types; `make generate` writes them.

The text around them is written by hand; what stands between two marker lines is replaced.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turboquant_operator.api.crd import Schema, structural_schema
from turboquant_operator.api.spec import TurboQuantDeploymentSpec
from turboquant_operator.api.status import TurboQuantDeploymentStatus

DOCUMENT = Path("docs") / "api.md"

SHOWN_CHOICES = 5
"""A field with more values than this says in its description what they are."""


def with_tables(document: str) -> str:
    """The document with both tables as the types have them. Raises ValueError where a marker is missing."""
    for part, model in (("spec", TurboQuantDeploymentSpec), ("status", TurboQuantDeploymentStatus)):
        begin, end = f"<!-- {part}: written by `make generate` -->\n", f"<!-- end of {part} -->\n"
        before, _, rest = document.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the document lacks the lines {begin!r} and {end!r}")
        document = before + begin + table(part, structural_schema(model)) + end + after
    return document


def table(root: str, schema: Schema) -> str:
    """A Markdown table of every field below `root`. Nobody writes a status: it has no column of defaults."""
    columns = ["field", "type", "default", "meaning"]
    rows = [
        [
            f"`{path}`",
            _type(node),
            "required" if required else _default(node.get("default")),
            node.get("description", ""),
        ]
        for path, node, required in _fields(root, schema)
    ]
    shown = [i for i, column in enumerate(columns) if column != "default" or root != "status"]
    lines = [[row[i].replace("|", "\\|") for i in shown] for row in (columns, ["---"] * len(columns), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _fields(path: str, node: Schema) -> Iterator[tuple[str, Schema, bool]]:
    """Each field with its path and whether it must be given, in the order of the types."""
    for name, child in node.get("properties", {}).items():
        yield f"{path}.{name}", child, name in node.get("required", ())
        yield from _fields(f"{path}.{name}", child)
        yield from _fields(f"{path}.{name}[]", child.get("items", {}))


def _type(node: Schema) -> str:
    if "x-kubernetes-int-or-string" in node:
        return "integer or string"
    if "enum" in node:
        choices = node["enum"]
        return " | ".join(choices) if len(choices) <= SHOWN_CHOICES else f"one of {len(choices)} names"
    if node["type"] == "array":
        return f"list: {_type(node['items'])}"
    if "additionalProperties" in node:
        return f"map: {_type(node['additionalProperties'])}"
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None and high is not None:
        return f"{node['type']}, {low} to {high}"
    return f"{node['type']}, at least {low}" if low is not None else str(node["type"])


def _default(default: Any) -> str:
    if default is None or default == {}:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def main(root: Path = Path()) -> None:
    """Bring the document below the repository's root up to date."""
    path = root / DOCUMENT
    path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
