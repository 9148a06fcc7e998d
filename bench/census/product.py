"""A kernel for Triton; imported only where Triton is."""

import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def product(a, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """A square of numbers times itself."""
    row = tl.arange(0, size)
    square = row[:, None] * size + row[None, :]
    values = tl.load(a + square)
    tl.store(out + square, tl.dot(values, values).to(tl.float32))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def stored(a, cache, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of 16 bits through a cache of another type and back."""
    place = tl.arange(0, size)
    tl.store(cache + place, tl.load(a + place).to(tl.float32).to(cache.dtype.element_ty))
    tl.store(out + place, tl.load(cache + place).to(tl.float32))
