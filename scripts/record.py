"""``python scripts/record.py``: docs/terminal.svg, what a command shows on a terminal, in colours.

The command runs as anybody runs it; its output is drawn by rich.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from turbofit.api import plan
from turbofit.report.painters.terminal import paint
from turbofit.report.views.plan_view import plan_view

SHOWN: Final = Path(__file__).parents[1] / "docs" / "terminal.svg"
COMMAND: Final = "turbofit plan internvl2-8b --on 1xrtx3090"
_WIDTH: Final = 84
#: Fonts of the network, which a page of ours does not load.
_FONTS: Final = re.compile(r"@font-face \{.*?\}", re.DOTALL)


def drawn() -> str:
    """The picture; equal each time for an equal plan."""
    _, _, model, _, on = COMMAND.split()
    said = paint(plan_view(plan(model, on=on)), width=80, colour=True, short=True)
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"$ {COMMAND}\n{said}".rstrip()), soft_wrap=True)
    svg = console.export_svg(title="turbofit", theme=MONOKAI, unique_id="turbofit")
    return _FONTS.sub("", svg)


if __name__ == "__main__":
    SHOWN.write_text(drawn(), encoding="utf-8")
