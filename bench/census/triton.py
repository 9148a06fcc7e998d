"""``python -m bench.census.triton``: what Triton compiles for which architecture, without a GPU.

The PyTorch engine compiles its kernels on the machine itself. Compiles a matrix product for each
data type and architecture with the Triton that is installed (``TURBOFIT_CUDA_PATH`` may name a
folder with one), and prints the table of `TRITON.md`.
"""

from __future__ import annotations

import argparse
import os
import sys

_ARCHITECTURES = (70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "fp8 (fp8e4nv)": "*fp8e4nv"}


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m bench.census.triton", description=__doc__)
    parser.parse_args(argv)
    sys.path.insert(0, os.environ.get("TURBOFIT_CUDA_PATH", ""))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.census.product import product

    print(f"Triton {triton.__version__}\n")
    print(f"| | {' | '.join(f'sm_{number}' for number in _ARCHITECTURES)} |")
    print(f"|---|{'---|' * len(_ARCHITECTURES)}")
    for name, pointer in _TYPES.items():
        cells = []
        for number in _ARCHITECTURES:
            signature = {"a": pointer, "out": "*fp32", "size": "constexpr"}
            source = ASTSource(fn=product, signature=signature, constexprs={"size": 32})
            try:
                triton.compile(source, target=GPUTarget("cuda", number, 32))
            except Exception as exc:  # noqa: BLE001 - the compiler's own, of any kind
                cells.append(_short(exc))
            else:
                cells.append("ok")
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


def _short(exc: Exception) -> str:
    text = str(exc)
    if "not supported in this architecture" in text:
        return "no such type"
    return type(exc).__name__


if __name__ == "__main__":
    sys.exit(main())
