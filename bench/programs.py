"""What ``python -m bench.NAME`` says where a bench has several programs: their commands."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

__all__ = ["show_programs"]

_BENCH = Path(__file__).resolve().parent


def show_programs(bench: str, names: Sequence[str], words: Sequence[str] | None = None) -> int:
    """Print the command and the first line of each program; none is imported.

    Args:
        bench: the folder.
        names: of the programs, files in the folder.
        words: of the command line; None is the process's own.
    """
    lines = [f"  python -m bench.{bench}.{name}\n      {_about(bench, name)}" for name in names]
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{bench}",
        description="This bench has several programs; each has a --help of its own:\n\n"
        + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(words)
    parser.print_help()
    return 0


def _about(bench: str, name: str) -> str:
    """The first line of a program's docstring."""
    text = (_BENCH / bench / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
