"""The catalogue, and what node labels say."""

from turboquant_operator.planner.accelerators import NodeGPUs, catalogue, find_accelerators

LABELS = {"nvidia.com/gpu.product": "NVIDIA-L4", "nvidia.com/gpu.memory": "23034"}


def test_a_node_is_read_from_labels_and_allocatable():
    assert NodeGPUs.from_node(LABELS, {"nvidia.com/gpu": "4"}) == NodeGPUs("NVIDIA-L4", 4, 23_034)


def test_a_node_says_the_compute_capability_of_its_gpus():
    labels = {**LABELS, "nvidia.com/gpu.compute.major": "8"}
    node = NodeGPUs.from_node(labels, {"nvidia.com/gpu": "4"})
    assert node is not None
    assert node.compute_major == 8
    (found,) = find_accelerators("auto", [node])
    assert found.compute_major == 8


def test_a_node_without_gpus_or_label_counts_for_nothing():
    assert NodeGPUs.from_node(LABELS, {"cpu": "8"}) is None
    assert NodeGPUs.from_node({}, {"nvidia.com/gpu": "4"}) is None
    assert NodeGPUs.from_node(LABELS, {"nvidia.com/gpu": "0"}) is None


def test_a_known_product_without_a_memory_label_has_the_catalogues_memory():
    (found,) = find_accelerators("auto", [NodeGPUs("NVIDIA-L4", 2)])
    assert (found.name, found.memory_mib, found.gpus_per_node) == ("nvidia-l4-24gb", 23_034, 2)


def test_the_largest_node_of_a_kind_says_how_many_gpus_a_replica_may_have():
    nodes = [NodeGPUs("NVIDIA-L4", 1), NodeGPUs("NVIDIA-L4", 4), NodeGPUs("NVIDIA-L4", 2)]
    (found,) = find_accelerators("auto", nodes)
    assert found.gpus_per_node == 4


def test_kinds_come_smallest_first():
    nodes = [NodeGPUs("NVIDIA-H100-80GB-HBM3", 8), NodeGPUs("NVIDIA-L4", 4)]
    assert [gpu.name for gpu in find_accelerators("auto", nodes)] == ["nvidia-l4-24gb", "nvidia-h100-80gb"]


def test_no_product_is_two_kinds():
    products = [product for gpu in catalogue().values() for product in gpu.products]
    assert len(products) == len(set(products))
