"""The Triton kernels compiled for a GPU, without one: what their code loads and stores, in what order, and spills."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton", reason="Triton has no build for this system")

# In a process of its own: in this one triton.jit made interpreted functions.
COMPILE = r"""
import json, os, pathlib, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import route_triton as k

assert not k.INTERPRETED
options = k._options(1152)
warps = options.pop("num_warps")
TABLES, COUNTS = ("sources", "known", "gradients"), ("num_sources", "tokens")
FLOAT32 = ("query", "weight", "lse", "parts", "dshift_parts", "dscale_parts")
forward = dict(ALIGN=16, STAGES=k.STAGES)
backward = dict(ALIGN=16, STAGES=k.STAGES, ROWS=k.BACKWARD_ROWS)
CASES = {
    "forward": (k._forward, dict(forward, MODULATE=False, x=None, shift=None, scale=None)),
    "forward, modulated": (k._forward, dict(forward, MODULATE=True)),
    "backward": (k._backward, dict(backward, PER_TOKEN=False)),
    "backward per token": (k._backward, dict(backward, PER_TOKEN=True)),
    "modulate_backward": (k._modulate_backward, dict(ROWS=k.MODULATE_ROWS)),
    "modulate_backward, no dh": (k._modulate_backward, dict(ROWS=k.MODULATE_ROWS, dh_direct=None)),
}

def type_of(argument, constants):
    if argument in constants:
        return "constexpr"
    if argument in COUNTS or "stride" in argument:
        return "i32"
    if "eps" in argument:
        return "fp32"
    return ("i64",) * 32 if argument in TABLES else "*fp32" if argument in FLOAT32 else "*bf16"

cuobjdump = triton.knobs.nvidia.cuobjdump.path
found = {}
for name, (kernel, constants) in CASES.items():
    constants = options | constants
    signature = {argument: type_of(argument, constants) for argument in kernel.arg_names}
    attributes = {
        (j,): [["tt.divisibility", 16]]
        for j, (argument, kind) in enumerate(signature.items())
        if kind[0] == "*" or "stride" in argument
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(c),): v for c, v in constants.items()}, attributes)
    fixed = [parameter.name for parameter in kernel.params if not parameter.do_not_specialize]
    found[name] = dict(fixed=fixed, code={})
    for architecture in (90,) if "no dh" in name else (80, 100, 90):
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
        if cuobjdump and os.path.exists(cuobjdump):
            path = pathlib.Path(sys.argv[1], "kernel.cubin")
            path.write_bytes(compiled.asm["cubin"])
            done = subprocess.run([cuobjdump, "-sass", "-res-usage", path], capture_output=True, text=True, check=True)
            found[name]["code"][architecture] = done.stdout
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout).groups()
            cells = name, f"sm_{architecture}", registers, stack, compiled.metadata.shared
            print(f"| {' | '.join(map(str, cells))} |", file=sys.stderr)
    found[name] |= dict(ttir=compiled.asm["ttir"], ptx=compiled.asm["ptx"])  # of sm_90
print(json.dumps(found))
"""
KERNELS = ["forward", "forward, modulated", "backward", "backward per token"]
KERNELS += ["modulate_backward", "modulate_backward, no dh"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """By kernel, at the width of XL in bf16 and with 32 slots: its first and last code. Shown: its use of a GPU."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", COMPILE, folder]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print("| kernel | GPU | registers | bytes of spills | bytes of shared memory |", done.stderr, sep="\n")
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_kernels_move_sixteen_bytes_at_a_time_and_keep_an_order(compiled, kernel):
    ptx = compiled[kernel]["ptx"]
    copies = re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10\b", ptx)
    loads, stores = (re.findall(rf"\b{way}\.global(?:\.\w+(?:::\w+)*)*\.v4\.b32", ptx) for way in ("ld", "st"))
    assert loads and stores  # query, norm weight, dh; h and gradients
    assert bool(copies) == ("modulate_" not in kernel)  # sources, two iterations ahead
    assert not re.search(r"\bld\.global(?:\.\w+)*\.b16\b", ptx)  # nothing is read number by number
    assert not re.search(r"\b(atom|red)\.", ptx)  # sums in an order that changes from run to run
    # Triton compiles again for every integer argument that is 1 or a multiple of 16, unless told not to.
    assert not {"num_sources", "tokens"} & set(compiled[kernel]["fixed"])


@pytest.mark.parametrize("kernel", KERNELS[:4])
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_loops_over_sources_do_not_spill_registers(compiled, kernel, architecture):
    if not compiled[kernel]["code"]:
        pytest.skip("this build of Triton comes without cuobjdump")
    code = compiled[kernel]["code"][architecture]
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    lines = [(int(address, 16), instruction) for address, instruction in lines]
    ends = [(int(m[1], 16), at) for at, what in lines if (m := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", what))]
    loops = [(first, last) for first, last in ends if first < last]
    inner = [one for one in loops if not any(one[0] < two[0] and two[1] < one[1] for two in loops)]
    assert len(inner) == 1
    for first, last in inner:
        inside = [what for at, what in lines if first <= at <= last]
        assert any("FFMA" in what for what in inside) and not any(re.search(r"\b(LDL|STL)\b", what) for what in inside)


@pytest.mark.parametrize("kernel", KERNELS)
def test_offsets_are_64_bit(compiled, kernel):
    """Tokens x D exceed 2^31 at XL's scale. Only positions within a row, and what they grow from, may be 32-bit."""
    code = compiled[kernel]["ttir"]
    offsets = re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (i\d+)", code)
    assert offsets and set(offsets) == {"i64"}
    made = dict(re.findall(r"(%\w+) = ([\w.]+) ", code))
    widened = re.findall(r"arith\.extsi (%\w+) : i32 to i64", code)
    assert widened and not any(made.get(name) == "arith.muli" for name in widened)
