"""The GPUs that the planner knows: a catalogue as data, and what node labels say about a cluster.

Data: ``accelerators.json``, per name the values of the node label `nvidia.com/gpu.product` (set by GPU
feature discovery) and the memory that `nvidia-smi` and the label `nvidia.com/gpu.memory` report, in MiB.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from turboquant_operator.planner.outcome import NoPlan, unknown

CPU = "cpu"
PRODUCT_LABEL = "nvidia.com/gpu.product"
MEMORY_LABEL = "nvidia.com/gpu.memory"
COMPUTE_MAJOR_LABEL = "nvidia.com/gpu.compute.major"
GPU_RESOURCE = "nvidia.com/gpu"

GPUS_PER_NODE = 8
"""Most GPUs one replica may use where no node says how many it has: the size of an HGX board."""

RESERVED_MIB = 616
"""Memory that nvidia-smi counts and CUDA does not hand out (its `memory.reserved`), where the catalogue does
not say: that of the H200, the larger of two that were looked at with driver 580 (H100: 480)."""


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU."""

    name: str
    """Catalogue name, or the product label in lower case for a GPU that the catalogue lacks."""
    products: tuple[str, ...]
    """Values of `PRODUCT_LABEL` that are this GPU: what the pods' node affinity selects."""
    memory_mib: int
    gpus_per_node: int = GPUS_PER_NODE
    reserved_mib: int = RESERVED_MIB
    compute_major: int | None = None
    """Its compute capability before the dot, as nodes are labelled; None where nobody says."""

    @property
    def total_bytes(self) -> int:
        """What `cudaMemGetInfo` calls total, of which the engine takes its share."""
        return (self.memory_mib - self.reserved_mib) * 2**20


@dataclass(frozen=True)
class NodeGPUs:
    """The GPUs of one node, from its labels and `status.allocatable`."""

    product: str
    allocatable: int
    memory_mib: int | None = None
    compute_major: int | None = None

    @classmethod
    def from_node(cls, labels: Mapping[str, str], allocatable: Mapping[str, str]) -> "NodeGPUs | None":
        """Of a node's metadata.labels and status.allocatable; None for a node without labelled GPUs."""
        count = allocatable.get(GPU_RESOURCE, "0")
        product = labels.get(PRODUCT_LABEL)
        if not product or not count.isdigit() or count == "0":
            return None

        def number(label: str) -> int | None:
            value = labels.get(label, "")
            return int(value) if value.isdigit() else None

        return cls(product, int(count), number(MEMORY_LABEL), number(COMPUTE_MAJOR_LABEL))


@cache
def catalogue() -> Mapping[str, Accelerator]:
    """All known GPUs by name."""
    document = json.loads((files(__package__) / "accelerators.json").read_text())
    return {
        name: Accelerator(
            name,
            tuple(entry["products"]),
            entry["memory_mib"],
            reserved_mib=entry.get("reserved_mib", RESERVED_MIB),
        )
        for name, entry in document.items()
    }


def find_accelerators(kind: str, nodes: Iterable[NodeGPUs] | None) -> tuple[Accelerator, ...] | NoPlan:
    """The GPUs that `spec.accelerator.type` allows, those of the cluster's nodes for `auto`.

    `nodes` is None where the operator may not list nodes.
    """
    present = None if nodes is None else _of_nodes(nodes)
    if kind == "auto":
        if present is None:
            return unknown(
                "NodesNotReadable",
                "accelerator.type is auto and this operator may not list nodes: name the type, "
                f"one of {', '.join(catalogue())}.",
            )
        if not present:
            return unknown(
                "NoAcceleratorFound",
                f"No node has both GPUs to allocate and the label {PRODUCT_LABEL} with a known memory size: "
                "install GPU feature discovery, or name accelerator.type.",
            )
        return present
    found = next((gpu for gpu in present or () if gpu.name == kind), None) or catalogue().get(kind)
    if found is None:
        near = difflib.get_close_matches(kind, catalogue(), n=3, cutoff=0.4) or list(catalogue())
        return unknown(
            "UnknownAccelerator",
            f"accelerator.type {kind!r} is neither in the catalogue nor the label of a node; "
            f"near: {', '.join(near)}.",
        )
    return (found,)


def _of_nodes(nodes: Iterable[NodeGPUs]) -> tuple[Accelerator, ...]:
    """One accelerator per kind of GPU among the nodes, with the GPUs of its largest node."""
    by_product = {product: gpu for gpu in catalogue().values() for product in gpu.products}
    found: dict[str, Accelerator] = {}
    for node in nodes:
        known = by_product.get(node.product)
        memory = node.memory_mib or (known.memory_mib if known else None)
        if memory is None:
            continue
        name = known.name if known else node.product.lower()
        before = found.get(name)
        found[name] = Accelerator(
            name,
            known.products if known else (node.product,),
            min(memory, before.memory_mib) if before else memory,
            max(node.allocatable, before.gpus_per_node) if before else node.allocatable,
            known.reserved_mib if known else RESERVED_MIB,
            node.compute_major,
        )
    return tuple(sorted(found.values(), key=lambda gpu: (gpu.memory_mib, gpu.name)))
