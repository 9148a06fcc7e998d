"""Writes the entry points that nobody wrote by hand, in C, from what installed programs import.

A generated entry point does nothing. Of a library that computes it says that it succeeded; of the
runtime and the driver it says "not supported", since a caller would go on with outputs that nobody
filled in. With ``TURBOFIT_PRETEND_VERBOSE`` in the environment each names itself once on stderr.
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

"""


def stub_source(family: str, names: Iterable[str]) -> str:
    """The C source of weak functions of a family (``libcublas``), one for each name."""
    answer = _NOT_SUPPORTED if family in _REFUSING else 0
    return _HEAD % (family, answer) + "".join(f"STUB({name})\n" for name in sorted(names))
