"""Blocks as Markdown, which names and commands of others cannot break."""

from __future__ import annotations

from tests.support.plans import plausible_plan
from turbofit.core.plan import Remedy
from turbofit.report.painters import markdown
from turbofit.report.painters.document import Code, Table
from turbofit.report.views.plan_view import plan_view


def test_markdown_tables_are_whole_and_names_cannot_break_them() -> None:
    evil = plausible_plan(
        fits=False,
        warnings=("a | b\n# c <script>",),
        remedies=(Remedy(change="x|y", effect="`z`"),),
    )
    text = markdown.paint(plan_view(evil))
    assert text.startswith("# internvl2-8b on 4xrtx3090 with turbomind\n\n**does not fit: ")
    assert "<script>" not in text
    assert "| x\\|y | \\`z\\` |" in text
    tables = [block for block in plan_view(evil) if isinstance(block, Table) and block.whole]
    for table in tables:
        columns = len(table.columns)
        painted = markdown.paint([table]).replace("\\|", "")
        assert {line.count("|") for line in painted.splitlines()} == {columns + 1}


def test_code_of_others_neither_ends_its_fence_nor_steers_a_terminal() -> None:
    assert markdown.paint([Code("echo ```")]).startswith("````sh")
    text = markdown.paint([Code("serve '\x1b]0;owned\x07'\nnext \u202eline")])
    assert text == "```sh\nserve '?]0;owned?'\nnext ?line\n```\n"
