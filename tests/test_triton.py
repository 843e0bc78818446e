"""Are the Triton kernels right as far as a machine without a GPU can tell?

Three checks, none of which is a speed: the interpreter against float64 with guarded memory (`interpreted_kernels.py`, in a
process of its own), compilation for sm_80 and sm_90 with the wheel's own ptxas under a budget of registers, spills and
shared memory, and that nothing needs Triton where it is absent. What stays unchecked: tensor-core and asynchronous-copy
correctness, races inside a program, bfloat16 rounding inside a kernel, and time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes one block may use

KERNELS = {
    "lens_tile": {"pointers": {"hidden": "x", "head": "x", "peak": "fp32", "total": "fp32", "best": "i32"}},
    "lens_delta": {
        "pointers": {"final": "x", "change": "x", "head": "x", "log_z": "fp32", "centre": "fp32", "total": "fp32"}
    },
}  # fmt: skip


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
from importlib.machinery import ModuleSpec
from engram_interp.kernels import lens_kl
lens_kl.find_spec = lambda name: None
assert lens_kl.choose_path(torch.device("cuda")).path == "exact"
head, final = torch.randn(50, 16), torch.randn(4, 16)
found = lens_kl.lens_kl(torch.stack([final + 1, final]), final, head, torch.tensor([1, 2, 3, -1]))
assert found.choice.path == "exact" and (found.kl[1] == 0).all()
assert "engram_interp.kernels.triton_lens" not in sys.modules
"""


def test_nothing_needs_triton():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False, cwd=ROOT
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def compiled(
    kernel, pointers: dict[str, str], integers: dict[str, str], constants: dict[str, int], arch: int, **options
):
    """A kernel compiled for a GPU that is not here, with the alignment a launch would find."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    types = {**{n: f"*{t}" for n, t in pointers.items()}, **integers}
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in pointers},
    )
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(built, arch: int, folder: Path) -> dict[str, int]:
    """Registers and spilled bytes that the wheel's own ptxas reports."""
    import triton

    ptx = folder / "kernel.ptx"
    ptx.write_text(built.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    name = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
    report = subprocess.run(
        [ptxas, "-v", "--gpu-name", name, ptx, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    found = {
        "registers": r"Used (\d+) registers", "stores": r"(\d+) bytes spill stores", "loads": r"(\d+) bytes spill loads"
    }  # fmt: skip
    return {key: max(int(x) for x in re.findall(pattern, report)) for key, pattern in found.items()}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", list(KERNELS))
def test_lens_kernels_fit_the_gpu(name, dtype, arch, tmp_path):
    pytest.importorskip("triton")
    from engram_interp.kernels import triton_lens

    pointers = {key: dtype if kind == "x" else kind for key, kind in KERNELS[name]["pointers"].items()}
    tile, launch = triton_lens.PLANS[name, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]]
    constants = {**tile, "D": 256, "UPCAST": False, "PRECISION": triton_lens.PRECISION}
    integers = dict.fromkeys(("n", "v", "tiles"), "i32")
    built = compiled(getattr(triton_lens, name), pointers, integers, constants, arch, **launch)
    used = resources(built, arch, tmp_path)
    print(name, dtype, arch, used, "shared", built.metadata.shared)
    assert used["stores"] == used["loads"] == 0
    assert used["registers"] <= 255
    assert built.metadata.shared <= SHARED_MEMORY[arch]
    assert ("wgmma" if arch == 90 else "mma.sync") in built.asm["ptx"]  # tensor cores,
    assert "cp.async" in built.asm["ptx"]  # fed by asynchronous copies


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [8, 160])
def test_ngram_kernel_fits_the_gpu(width, arch, tmp_path):
    triton = pytest.importorskip("triton")
    from engram_interp.kernels.triton_ngram import BLOCK_T, WARPS, ngram_gather

    integers = dict.fromkeys(("compressed", "multipliers", "primes", "magics", "offsets"), "i64")
    constants = {"SLOTS": 16, "HEADS": 8, "ORDERS": 2, "WIDTH": width, "BLOCK_T": BLOCK_T}
    built = compiled(
        ngram_gather, {**integers, "table": "fp32", "out": "fp32"}, dict.fromkeys(("texts", "length", "pad"), "i32"),
        {**constants, "BLOCK_W": triton.next_power_of_2(width)}, arch, num_warps=WARPS,
    )  # fmt: skip
    used = resources(built, arch, tmp_path)
    print("ngram_gather", width, arch, used, "shared", built.metadata.shared)
    assert used["stores"] == used["loads"] == 0
    assert used["registers"] <= 128
    assert built.metadata.shared <= 48 * 1024
    assert "mul.hi.u64" in built.asm["ptx"]
    assert not re.findall(r"\b(?:rem|div)\.[su]64", built.asm["ptx"])  # Barrett: no 64-bit division subroutine
