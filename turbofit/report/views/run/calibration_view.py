"""What a calibration measured beside its plan, and what later plans take from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.units import format_bytes, mib
from turbofit.report.painters.document import Column, Heading, Paragraph, Table

if TYPE_CHECKING:
    from turbofit.core.json_types import Document
    from turbofit.report.painters.document import Block

__all__ = ["calibration_view"]


def calibration_view(result: Document) -> list[Block]:
    """Blocks for `turbofit calibrate`.

    Args:
        result: the document ``turbofit.calibration/1``; sizes are bytes.
    """
    blocks: list[Block] = [Heading(text=f"Calibration of {result['model']}")]
    if result.get("pretend"):
        text = "PRETEND GPUs: this tries the calibration, and says nothing of any card"
        blocks.append(Paragraph(text=text, tone="bad"))
    columns = (
        Column(title="GPU"),
        Column(title="in use, MiB", wrap=True),
        Column(title="forecast", right=True),
        Column(title="measured", right=True),
        Column(title="paid, not taken", right=True),
    )
    rows = tuple(
        (str(row["gpu"]), row["phase"], mib(row["forecast"]), mib(row["measured"]),
         f"{row['over'] / (1 << 20):+,.1f}")
        for row in result["phases"]
    )  # fmt: skip
    blocks.append(Table(columns=columns, rows=rows))
    for one in result["calibrations"]:
        where = " + ".join(one["gpus"])
        text = (
            f"later plans on {where} count {_signed(one['context'])} before the cache and"
            f" {_signed(one['buffers'])} after it, beside their estimates"
        )
        if result["why_not"] is None:
            blocks.append(Paragraph(text=text, tone="good"))
    if result["why_not"] is not None:
        blocks.append(Paragraph(text=f"nothing was learned: {result['why_not']}", tone="bad"))
    return blocks


def _signed(size: int) -> str:
    if not size:
        return "nothing more"
    return f"{format_bytes(abs(size))} {'more' if size > 0 else 'less'}"
