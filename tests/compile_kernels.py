"""Compile the Triton kernels for a Hopper GPU, which none is needed for: the interpreter knows nothing of types.

In a process of its own, without TRITON_INTERPRET. Prints each kernel with the shared memory that it takes.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from collm.models.paged import kernels, llama_kernels, telling_kernels

TARGET = GPUTarget("cuda", 90, 32)
STRIDES = ("query_token", "query_head", "stride", "width")
FLOATS = ("scale", "cap", "eps", "factor")


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **options: int) -> None:
    """Arguments that are neither pointers nor constants are numbers. Pointers are aligned, as torch's are."""
    names = kernel.arg_names
    numbers = {name: "fp32" if name in FLOATS else "i32" for name in names}
    signature = {n: "constexpr" if n in constants else pointers.get(n, numbers[n]) for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n in STRIDES},
    )
    found = triton.compile(source, target=TARGET, options=options)
    print(kernel.__name__, found.metadata.shared)


def of(kind: str, names: str) -> dict[str, str]:
    plans = {"plan": "*i32", "table": "*i32", "part": "*fp32", "stats": "*fp32", "parts": "*fp32"}
    return plans | dict.fromkeys(names.split(), kind)


def main() -> None:
    kind, shape = "*bf16", {"HQ": 32, "G": 4, "D": 128, "DP": 128, "M": 16}
    compiled(kernels.enter, of(kind, ""), {"BLOCK": 256})
    compiled(
        kernels.store,
        of(kind, "key value keys values"),
        {"KV": 8, "D": 128, "DP": 128, "BLOCK": 256},
    )
    for windowed in (False, True):
        constants = {"BLOCK": 256, "N": 64, "NP": 256, "WINDOW": windowed, "CAP": windowed, "PRECISION": "tf32"}
        compiled(kernels.attend, of(kind, "query keys values out"), shape | constants, num_warps=4, num_stages=3)
    compiled(kernels.combine, of(kind, "out"), shape | {"AT_A_TIME": 4}, num_warps=4)
    compiled(telling_kernels.look, of(kind, "logits"), {"SHARE": 4096, "BV": 4096, "S": 8})
    told = of(kind, "hidden") | {"weight": "*fp32", "bias": "*fp32", "out": "*i32"}
    compiled(telling_kernels.tell, told, {"S": 8, "SP": 8, "BH": 4096, "K": 2, "KP": 4, "C": 9})
    compiled(telling_kernels.choose, of(kind, "logits") | {"out": "*i32"}, {"C": 9, "BV": 4096}, num_warps=8)
    compiled(llama_kernels.add_norm, of(kind, "x delta weight out"), {"ADD": True, "B": 4096}, num_warps=8)
    compiled(llama_kernels.gated, of(kind, "gate_up out"), {"B": 1024})
    turned = of(kind, "qkv query keys values query_norm key_norm") | {"cos": "*fp32", "sin": "*fp32"}
    for rotated, normed in ((128, False), (96, True), (0, False)):
        constants = {"HQ": 32, "KV": 8, "D": 128, "DP": 128, "R": rotated, "BLOCK": 256, "NORM": normed}
        compiled(llama_kernels.turn_and_store, turned, constants, num_warps=1)


if __name__ == "__main__":
    main()
