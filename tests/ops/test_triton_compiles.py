"""The kernels as they would be launched on a Hopper GPU, compiled to machine code without one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow]

# What a block of compute capability 9.0 may have.
MOST_SHARED_BYTES = 227 * 1024

# Calls of the launchers on CPU tensors, in which a launch only compiles. Printed: name, variant, and what came out.
SCRIPT = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

driver.set_active(Hopper())
run = JITFunction.run
seen = {}

def compile_only(self, *args, grid, warmup, **constants):
    kernel = run(self, *args, grid=grid, warmup=True, **constants)
    if id(kernel) not in seen:
        seen[id(kernel)] = kernel
        print(json.dumps({
            "kernel": self.__name__, "of": of, "shared": kernel.metadata.shared, "wgmma": "wgmma" in kernel.asm["ptx"],
            "bytes": len(kernel.asm["cubin"]),
            "by_16_bytes": "cp.async.cg" in kernel.asm["ptx"] or "ld.global.v4" in kernel.asm["ptx"],
        }))

JITFunction.run = compile_only
from bmm_engine.ops import _triton
_triton.processors = lambda device: 132
from bmm_engine.ops.assemble import triton_kernel as assemble
from bmm_engine.ops.cross_gram import triton_kernel as cross_gram
from bmm_engine.ops.gram import triton_kernel as gram
from bmm_engine.ops.residual import triton_kernel as residual
from bmm_engine.ops.spectral import triton_kernel as spectral

def zeros(*shape, dtype=torch.float32): return torch.zeros(shape, dtype=dtype)
brain = torch.bfloat16
rows, width = 1100, 4096  # 528 tiles on and above the diagonal, too many to be split
weights = {"plain": None, "mask": torch.ones(rows, dtype=torch.bool), "numbers": torch.ones(rows)}
for of, dtype, kind, precision, n in (
    ("bfloat16", brain, "plain", "ieee", width), ("bfloat16, mask", brain, "mask", "ieee", width),
    ("bfloat16, numbers", brain, "numbers", "ieee", width), ("float32", torch.float32, "plain", "ieee", width),
    ("tf32x3, mask", torch.float32, "mask", "tf32x3", width), ("bfloat16, narrow", brain, "plain", "ieee", 48),
    ("bfloat16, odd", brain, "plain", "ieee", 301),
):
    gram.accumulate_gram(zeros(n, n), zeros(rows, n, dtype=dtype), weights[kind], precision)
for kind in weights:
    of = f"bfloat16, {kind}"
    own = weights[kind] if kind == "plain" else weights[kind].view(-1)
    gram.accumulate_grams([zeros(304, 304)] * 2, [zeros(rows, 304, dtype=brain)] * 2, [own] * 2, "ieee")
of = "bfloat16, direct"
gram.accumulate_grams([zeros(304, 304)] * 2, [zeros(100, 304, dtype=brain)] * 2, [None] * 2, "ieee")
for of, precision, dtype, wide in (("bfloat16", "ieee", brain, 4096), ("tf32", "tf32", torch.float32, 304)):
    X = zeros(rows, wide, dtype=dtype)
    cross_gram.accumulate_cross_gram(zeros(wide, wide), X, X, None, zeros(wide, wide), precision)
of = "one transposed"
Y = zeros(304, rows).T
cross_gram.accumulate_cross_gram(zeros(wide, 304), X, Y, weights["mask"], zeros(304, 304), "ieee")
for of, dtype in (("float32", torch.float32), ("float64", torch.float64)):
    assemble.assemble([zeros(2, 304, 304)] * 3, [1.0] * 3, [1.0, 2.0], 0.5, zeros(2, 304, 304, dtype=dtype))
for precision in ("ieee", "tf32x3"):
    of = precision
    W = zeros(304, 304, dtype=brain)
    residual.residual(W, [W] * 3, [zeros(304, 304)] * 3, [1.0] * 3, zeros(304, 304), precision)
    spectral.apply_spectral(W, W, zeros(304, 304), zeros(304), zeros(304, 304), W, 0.5, precision)
"""

# Kernels, and of which variants.
EXPECTED = {
    "_gram": 7,
    "_reduce": 2,
    "_gram_group": 4,
    "_reduce_group": 1,
    "_cross_gram": 3,
    "_assemble": 2,
    "_residual": 2,
    "_spectral": 2,
}


def _supported() -> str:
    """Why this cannot be tried, or nothing."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    return "" if tuple(map(int, version.split(".")[:2])) >= (3, 3) else f"written for triton >= 3.3, not {version}"


@pytest.mark.skipif(bool(_supported()), reason=_supported())
def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=280, env=environment, cwd=os.getcwd()
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    for name, least in EXPECTED.items():
        assert sum(one["kernel"] == name for one in compiled) >= least, f"{name}: {compiled}"
    for one in compiled:
        what = f"{one['kernel']} of {one['of']}"
        assert one["bytes"], what
        assert one["shared"] <= MOST_SHARED_BYTES, f"{what} wants {one['shared']} bytes of shared memory"
        multiplies = one["kernel"] in ("_gram", "_gram_group", "_cross_gram", "_residual", "_spectral")
        exact = one["of"] in ("float32", "ieee", "one transposed")  # float32 products that no tensor core makes
        # Also where the pointers come from a table. TF32 products want their factors transposed, element by element.
        narrow = one["of"] in ("bfloat16, odd", "tf32", "one transposed") and one["kernel"] != "_reduce"
        assert one["by_16_bytes"] != narrow, what
        assert one["wgmma"] == (multiplies and not exact), f"{what} is not on the path it was written for"
