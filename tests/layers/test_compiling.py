"""The kernels compile for GPUs that are not here, and keep to their registers: Triton's compiler minds types that its interpreter does not.

The sizes are those of a Llama of 8B in bf16. Needs Triton alone, which brings NVIDIA's assembler along.
"""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

HALF, WHOLE = "*bf16", "*fp32"
LORA = {"whole": True, "rows": 128, "columns": 128, "depth": 64, "ranks": 16, "strips": 8}
FORWARD, BACKWARD = (dict.fromkeys(names, 1) for names in (("x_in", "w_in", "a_in", "b_rank"), ("x_in", "w_out", "a_rank", "b_out")))
# Of each kernel: types of arguments that are no bf16 tensors and no int32, constants, and options of the launch.
KERNELS: dict[str, tuple[str, dict[str, str], dict[str, Any], dict[str, int]]] = {
    "nf4": (
        "nf4_triton._kernel",
        {"packed": "*u8", "absmax": "*u8", "levels": WHOLE, "nested_code": WHOLE, "nested_absmax": WHOLE, "offset": "fp32"}
        | dict.fromkeys(("size", "n"), "i32"),
        {"block_size": 64, "nested_block_size": 256, "nested": True, "blocks": 32, "count": 32},
        {"enable_fp_fusion": False},
    ),
    **{
        f"loss, capped={capped}": (
            "cross_entropy_triton._kernel",
            {"goals": "*i64", "losses": WHOLE, "stride": "i32", "vocabulary": "i32", "scale": "fp32", "cap": "fp32"},
            {"capped": capped, "block": 4096},
            {"num_warps": 8},
        )
        for capped in (False, True)
    },
    "shrink": ("mixed_triton._shrink", {"whose": "*i64", "h": WHOLE, "width": "i32", "rank": "i32"}, {"ranks": 16, "block": 512}, {}),
    "expand": (
        "mixed_triton._expand",
        {"whose": "*i64", "h": WHOLE, "out": "i32", "rank": "i32", "pieces": "i32"},
        {"ranks": 16, "block": 512},
        {},
    ),
    **{
        f"LoRA, {way}": (
            "lora_triton._kernel",
            dict.fromkeys(("n", "out", "width", "rank", *strides), "i32") | {"s": "fp32"},
            LORA | {"biased": way == "forward"} | ones,
            {"num_warps": 8, "num_stages": 3},
        )
        for way, ones, strides in (
            ("forward", FORWARD, ("x_row", "w_out", "a_rank", "b_out")),
            ("backward", BACKWARD, ("x_row", "w_in", "a_in", "b_rank")),
        )
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("card", [80, 90], ids=["A100", "H100"])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_and_spills_nothing(name: str, card: int, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="needs Triton, which comes with torch's CUDA builds: pip install triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place, types, constants, options = KERNELS[name]
    file, _, function = place.partition(".")
    kernel = getattr(import_module(f"lora_nb.layers.{file}"), function)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, HALF) for n in names}
    whole = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] in "*i"}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, whole)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(triton.compile(source, target=GPUTarget("cuda", card, 32), options=options).asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    used = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in used
