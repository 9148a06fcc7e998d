"""``turbofit merge``: a LoRA into its checkpoint, LLaVA's original format into the hf format."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from turbofit.cli import options
from turbofit.core.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from turbofit.cli.parser import Parser
    from turbofit.model.merge.merge import Merged
    from turbofit.report.document import Block

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """The folders, and how the result is written."""
    parser.usage = "turbofit merge [OPTIONS] BASE [ADAPTER] OUT"
    parser.add_argument(
        "folders",
        metavar="BASE [ADAPTER] OUT",
        nargs="+",
        help="the checkpoint and the LoRA (folders, or hub ids in the local cache), and the folder"
        " to make; without ADAPTER an original LLaVA is converted to the hf format",
    )
    parser.add_argument(
        "--vision-tower",
        metavar="FOLDER",
        help="CLIP's checkpoint, for an original LLaVA without it (default: the hub cache)",
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="default: the base's"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it is not empty")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Merge, and show what was written."""
    from turbofit.cli.output import answer, note, show
    from turbofit.core.struct import to_json
    from turbofit.model.merge.merge import merge

    if len(args.folders) not in (2, 3):
        raise UsageError(
            f"{len(args.folders)} folders were named", hint="turbofit merge BASE [ADAPTER] OUT"
        )
    base, out = args.folders[0], args.folders[-1]
    adapter = args.folders[1] if len(args.folders) == 3 else None
    with _ended_like_ctrl_c():
        merged = merge(
            base,
            adapter,
            out,
            vision_tower=args.vision_tower,
            dtype=args.dtype,
            force=args.force,
            say=note,
        )
    if args.json:
        answer(to_json(merged))
    else:
        show(list(_view(merged)), markdown=args.md)
    return 0


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """A SIGTERM clears away what was written so far, as Ctrl-C does."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _view(merged: Merged) -> Iterator[Block]:
    """What was written, what to heed, and what comes next."""
    from turbofit.core.units import format_bytes
    from turbofit.report.document import Heading, Line

    yield Heading(text=merged.out)
    yield Line(
        text=f"{merged.architecture}, {merged.dtype}: {merged.tensors} tensors,"
        f" {format_bytes(merged.bytes)}",
        tone="good",
    )
    if merged.adapter:
        yield Line(text=f"{merged.loras} modules merged, {merged.replaced} tensors replaced")
    if merged.converted:
        tower = merged.vision_tower or "the base itself"
        yield Line(text=f"converted from LLaVA's original format; vision tower from {tower}")
    for warning in merged.warnings:
        yield Line(text=warning, tone="warn")
    yield Line(text=f"next: turbofit plan {merged.out}")
