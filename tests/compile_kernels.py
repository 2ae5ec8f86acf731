"""Compile the Triton kernels for GPUs, of which none is needed for it: the interpreter knows nothing of types.

In a process of its own, without TRITON_INTERPRET. Prints each kernel with the compute capability and the shared memory
that it takes.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from collm.models.paged import kernels, llama_kernels, telling_kernels
from collm.models.paged.pool import WIDE_TILE
from collm.models.paged.triton_dense import NUMBERS
from collm.models.paged.triton_ops import COMBINED, READS, WIDE

HOPPER, ADA = (GPUTarget("cuda", capability, 32) for capability in (90, 89))
QKVO = "query keys values out"
STRIDES = ("query_token", "query_head", "stride", "width")
FLOATS = ("scale", "cap", "eps", "factor")


def compiled(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], target: GPUTarget = HOPPER, **options: int
) -> None:
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
    found = triton.compile(source, target=target, options=options)
    print(kernel.__name__, target.arch, found.metadata.shared)


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
    (keys, stages), *_, (fewest, least) = READS
    for windowed in (False, True):
        constants = {"BLOCK": 256, "NP": 256, "WINDOW": windowed, "CAP": windowed, "PRECISION": "tf32"}
        for wide in (0, WIDE):
            read = constants | {"N": keys, "WIDE": wide}
            compiled(kernels.attend, of(kind, QKVO), shape | read, num_warps=4, num_stages=stages)
    large = shape | {"D": 256, "DP": 256, "M": WIDE_TILE}
    read = constants | {"N": fewest, "WIDE": 0, "PRECISION": "ieee"}
    compiled(kernels.attend, of("*fp32", QKVO), large | read, ADA, num_warps=4, num_stages=least)
    compiled(kernels.combine, of(kind, "out"), shape | {"GP": 4, "CHUNKS": COMBINED // 4}, num_warps=4)
    compiled(telling_kernels.look, of(kind, "logits"), {"SHARE": 4096, "BV": 4096, "S": 8})
    told = of(kind, "hidden") | {"weight": "*fp32", "bias": "*fp32", "out": "*i32"}
    compiled(telling_kernels.tell, told, {"S": 8, "SP": 8, "BH": 4096, "K": 2, "KP": 4, "C": 9})
    compiled(telling_kernels.choose, of(kind, "logits") | {"out": "*i32"}, {"C": 9, "BV": 4096}, num_warps=8)
    compiled(llama_kernels.embed, of(kind, "table out"), {"B": NUMBERS})
    compiled(llama_kernels.add_norm, of(kind, "x delta weight out"), {"ADD": True, "B": 4096}, num_warps=8)
    compiled(llama_kernels.gated, of(kind, "gate_up out"), {"B": NUMBERS})
    turned = of(kind, "qkv query keys values query_norm key_norm") | {"cos": "*fp32", "sin": "*fp32"}
    for rotated, normed in ((128, False), (96, True), (0, False)):
        constants = {"HQ": 32, "KV": 8, "D": 128, "DP": 128, "R": rotated, "BLOCK": 256, "NORM": normed}
        compiled(llama_kernels.turn_and_store, turned, constants, num_warps=1)


if __name__ == "__main__":
    main()
