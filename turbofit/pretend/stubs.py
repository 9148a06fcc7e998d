"""Writes the entry points that nobody wrote by hand, in C, from what installed programs import.

A generated entry point does nothing. Of a library that computes it says that it succeeded; of the
runtime and the driver it says "not supported", since a caller would go on with outputs that nobody
filled in. With ``TURBOFIT_TRACE_STUBS`` in the environment each names itself once on stderr.
A variable is zeros: its size is not known to who imports it, so it has room.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["stub_source"]

_REFUSING = ("libcudart", "libcuda")
_NOT_SUPPORTED = 801  # cudaErrorNotSupported and CUDA_ERROR_NOT_SUPPORTED

_HEAD = """\
/* Generated: entry points of %s that do nothing; one written by hand takes its place. */
#include "account.h"

#define STUB(name) \\
    __attribute__((weak, visibility("default"))) int name(void); \\
    __attribute__((weak, visibility("default"))) int name(void) \\
    { \\
        static int told; \\
        if (!told) { \\
            told = 1; \\
            pretend_stub(#name); \\
        } \\
        return %d; \\
    }
#define VARIABLE(name) __attribute__((weak, visibility("default"))) char name[4096];

"""


def stub_source(family: str, names: Iterable[str], variables: Iterable[str] = ()) -> str:
    """The C source of weak functions and variables of a family (``libcublas``)."""
    answer = _NOT_SUPPORTED if family in _REFUSING else 0
    lines = [f"STUB({name})\n" for name in sorted(names)]
    lines += [f"VARIABLE({name})\n" for name in sorted(variables)]
    return _HEAD % (family, answer) + "".join(lines)
