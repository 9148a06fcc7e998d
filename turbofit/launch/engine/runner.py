"""The words that start LMDeploy in an interpreter, through `entry.py`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["module_runner"]


def module_runner(module: str, interpreter: Sequence[str] = ()) -> tuple[str, ...]:
    """Start a module's command line; the arguments follow.

    Args:
        module: ``lmdeploy``, or what stands in for it.
        interpreter: the words of the interpreter that has it; ours where there are none.
    """
    return (*(interpreter or (sys.executable,)), str(Path(__file__).with_name("entry.py")), module)
