"""The compiler front of `turboquant_kernels.aot`, on kernels made for it."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

SCRIPT = """
import dataclasses, json
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.language.extra.cuda import gdc_wait
from triton.experimental.gluon import language as gl
from turboquant_kernels.aot import AotVariant, build, compile_variant, shipped

@triton.jit
def scale(source, target, n, factor: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < n) * factor, mask=i < n)

@gluon.jit
def double(source, target, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout=layout)
    gl.store(target + i, gl.load(source + i) * 2)

@gluon.jit
def pass_through_memory(source, target, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, BLOCK, layout=layout)
    memory = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    memory.store(gl.load(source + i))
    gl.barrier()
    gl.store(target + i, memory.load(layout))

@triton.jit
def row(source, target, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i))

@triton.jit
def reverse(source, target, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(source + i)
    tl.store(target + i, tl.cumsum(x, reverse=True) + x)

@triton.jit
def early(source, target, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
    tl.store(target, tl.load(source))

POINTERS = {"source": "*fp32", "target": "*fp32"}
variants = [
    AotVariant("triton", scale, {**POINTERS, "n": "i32"}, {"factor": 3.0, "BLOCK": 128}),
    AotVariant("gluon", double, POINTERS, {"BLOCK": 128}),
    AotVariant("any stride", row, {**POINTERS, "stride": "i32"}, {"BLOCK": 1024}),
    AotVariant("aligned", row, {**POINTERS, "stride": "i32"}, {"BLOCK": 1024}, divisible=("stride",)),
    AotVariant("spills", reverse, POINTERS, {"BLOCK": 2048}, num_warps=1, options={"maxnreg": 32}),
    AotVariant("large", pass_through_memory, POINTERS, {"BLOCK": 1 << 15}),
    AotVariant("unnamed", scale, POINTERS, {"BLOCK": 128}),
    AotVariant("named twice", early, POINTERS, {"PDL": False}),
]
for variant in variants:
    for capability in (80, 89, 90, 100, 120) if variant.name in ("triton", "gluon", "large") else (90,):
        try:
            print(json.dumps(dataclasses.asdict(compile_variant(variant, capability))))
        except ValueError as error:
            print(json.dumps({"variant": variant.name, "capability": capability, "error": str(error)}))

overlapping = [variant for variant in shipped() if "PDL" in variant.kernel.arg_names]
first_of_each = {variant.kernel: variant for variant in reversed(overlapping)}
for variant in [AotVariant("early", early, POINTERS), *first_of_each.values()]:
    for capability in (80, 90):
        kernel = build(variant, capability)
        result = {"ptx": kernel.asm["ptx"], "early": kernel.metadata.launch_pdl}
        print(json.dumps({"variant": variant.name, "capability": capability, **result}))
for variant in shipped():
    if variant.name in ("decode-hopper-k4v4-d128-r4", "decode-hopper-k4v4-d128-r4-split"):
        print(json.dumps({"variant": variant.name, "capability": 90, "ahead": build(variant, 90).asm["ptx"]}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By name and capability. In a process of its own: this one may interpret kernels."""
    path = tmp_path_factory.mktemp("aot") / "kernels.py"  # Triton reads a kernel's source from its file
    path.write_text(SCRIPT)
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = [SimpleNamespace(**json.loads(line)) for line in run.stdout.splitlines()]
    return {(result.variant, result.capability): result for result in results}


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("name", ["triton", "gluon"])
def test_kernels_of_both_languages_compile_for_every_target(name, capability, compiled):
    result = compiled[name, capability]
    assert 4 < result.registers < 40
    assert result.spill_bytes == 0
    assert 5 < result.instructions < 80


def test_spills_are_seen(compiled):
    assert compiled["spills", 90].spill_bytes > 50
    assert compiled["spills", 90].registers <= 32


def test_more_shared_memory_than_a_gpu_has_is_told(compiled):
    assert compiled["large", 90].shared_bytes == 128 << 10
    for capability in (89, 120):
        assert "131072 bytes of shared memory, more than 101376" in compiled["large", capability].error


def test_multiples_of_16_are_specialized(compiled):
    assert compiled["aligned", 90].instructions < compiled["any stride", 90].instructions


def test_a_parameter_that_is_not_named_is_told(compiled):
    assert "unnamed: signature and constexprs disagree" in compiled["unnamed", 90].error
    assert "['factor', 'n']" in compiled["unnamed", 90].error


def test_a_parameter_that_follows_from_the_target_is_not_named(compiled):
    assert "a parameter named twice" in compiled["named twice", 90].error


def test_kernels_that_are_launched_early_wait_before_they_touch_memory(compiled):
    """Those of the package, and on Ampere, which has no such launches, nothing of it."""
    names = {name for (name, _), result in compiled.items() if hasattr(result, "ptx")}
    assert {name.partition("-")[0] for name in names} == {"early", "store", "rotate", "unrotate", "decode"}
    for name in names:
        assert not compiled[name, 80].early
        assert "griddepcontrol" not in compiled[name, 80].ptx
        assert compiled[name, 90].early
        ptx = compiled[name, 90].ptx
        wait = ptx.index("griddepcontrol.wait")
        before, after = (re.findall(r"\b(ld|st|atom|red)\.global", part) for part in (ptx[:wait], ptx[wait:]))
        # The kernel ahead of the merge does not write two numbers of the schedule, nor that of `finish` raw
        # tokens.
        if name.startswith("decode-finish"):
            assert {*before} == {"ld"}
        else:
            assert before == (["ld", "ld"] if name.startswith("decode-merge") else [])
        assert after
        # Then the next kernel knows that everything before this one has ended.
        assert ptx.find("griddepcontrol.launch_dependents") in (-1, *range(wait, len(ptx)))


def test_decode_lets_a_merge_come_early_where_there_is_one(compiled):
    fused, split = (compiled[f"decode-hopper-k4v4-d128-r4{end}", 90].ahead for end in ("", "-split"))
    assert "griddepcontrol" not in fused
    assert split.count("griddepcontrol.launch_dependents") == 1
    assert "griddepcontrol.wait" not in split
