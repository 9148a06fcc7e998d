"""``python -m bench.census.triton``: what Triton compiles for which architecture, without a GPU.

The PyTorch engine compiles its kernels on the machine itself. Compiles a matrix product for each
data type and architecture with the Triton that is installed (``TURBOFIT_CUDA_PATH`` may name a
folder with one), and stores to and loads from a KV cache for each of fp8's types; prints the table
of `TRITON.md`.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from bench.page import table

_ARCHITECTURES = (70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "fp8 (fp8e4nv)": "*fp8e4nv"}
#: By ``quant_policy``.
_CACHES = {"KV cache, 16 (fp8e4nv)": "*fp8e4nv", "KV cache, 17 (fp8e5)": "*fp8e5"}


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.census.triton", description=__doc__)
    parser.parse_args(argv)
    sys.path.insert(0, os.environ.get("TURBOFIT_CUDA_PATH", ""))
    import triton

    from bench.census.product import product, stored

    ends = {"out": "*fp32", "size": "constexpr"}
    kernels = {name: (product, {"a": pointer, **ends}) for name, pointer in _TYPES.items()}
    kernels |= {
        name: (stored, {"a": "*fp16", "cache": pointer, **ends})
        for name, pointer in _CACHES.items()
    }
    rows = [
        (name, *(_compiled(kernel, signature, number) for number in _ARCHITECTURES))
        for name, (kernel, signature) in kernels.items()
    ]
    print(f"Triton {triton.__version__}\n")
    print(table(f"| {' | '.join(f'sm_{number}' for number in _ARCHITECTURES)}", rows))
    return 0


def _compiled(kernel: Any, signature: dict[str, str], number: int) -> str:
    """What compiling a kernel for an architecture comes to."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs={"size": 32})
    try:
        triton.compile(source, target=GPUTarget("cuda", number, 32))
    except Exception as exc:  # noqa: BLE001 - the compiler's own, of any kind
        no_type = "not supported in this architecture" in str(exc)
        return "no such type" if no_type else type(exc).__name__
    return "ok"


if __name__ == "__main__":
    sys.exit(main())
