"""What an inspection pod runs: reads a model where only a pod may, and tells the operator about it.

    python -m turboquant_runtime.inspect PATH
    python -m turboquant_runtime.inspect hf://organisation/name --revision main

Prints one line of JSON (`config`, `weights`, `revision`), or a sentence where it fails, and writes it to
the termination log too, from where the operator takes it. It interprets nothing:
`turboquant_operator.planner.facts` alone says what a config means. No torch, no engine.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turboquant_kernels.checkpoint import Checkpoint, CheckpointError, read_folder, read_hub

TERMINATION_LOG = Path("/dev/termination-log")

MESSAGE_BYTES = 4096
"""What the kubelet keeps of a termination message."""

_NESTED = {"text_config", "quantization_config", "compression_config", "rope_scaling", "rope_parameters"}
"""Objects whose fields matter to the planner, and are shortened one by one."""

_KEPT = {"architectures", "layer_types"}
_FIELD_BYTES = 160
"""Longest JSON of any other field. Beyond are label tables, vision towers and lists of module names."""


def shorten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every long field replaced by true: that it is there is all the planner asks of it."""
    short: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NESTED and isinstance(value, Mapping):
            short[name] = shorten(value)
        elif name in _KEPT or len(_compact(value)) <= _FIELD_BYTES:
            short[name] = value
        else:
            short[name] = True
    return short


def report(found: Checkpoint) -> str:
    """The termination message for a model. Raises CheckpointError where it is too long."""
    message = _compact(
        {"config": shorten(found.config), "weights": found.weights, "revision": found.revision}
    )
    size = len(message.encode())
    if size > MESSAGE_BYTES:
        raise CheckpointError(
            "ModelConfigTooLarge",
            f"The facts of this model take {size} bytes and a termination message holds {MESSAGE_BYTES}: set "
            "spec.model.architecture instead.",
        )
    return message


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads one model and reports it. Exit code 0, or 1 with a sentence in place of the report."""
    parser = argparse.ArgumentParser(prog="turboquant_runtime.inspect", description=__doc__)
    parser.add_argument("model", help="model folder, or hf://organisation/name")
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--termination-log", type=Path, default=TERMINATION_LOG, help="written if it exists already"
    )
    options = parser.parse_args(arguments)
    try:
        message, code = report(_read(options.model, options.revision)), 0
    except CheckpointError as error:
        message, code = str(error), 1
    print(message)
    if options.termination_log.exists():
        options.termination_log.write_text(message)
    return code


def _read(model: str, revision: str) -> Checkpoint:
    if model.startswith("hf://"):
        return read_hub(model.removeprefix("hf://"), revision)
    return read_folder(Path(model))


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    sys.exit(main())
