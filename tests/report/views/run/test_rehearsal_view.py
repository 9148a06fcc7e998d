"""The cases of a rehearsal."""

from __future__ import annotations

from msgspec.structs import replace

from tests.report.documents import planned
from turbofit.report.painters.document import Paragraph, Table
from turbofit.report.views.run.run_view import became_blocks


def test_cases_beyond_the_table_are_counted() -> None:
    plan = planned("served")
    seen = plan.rehearsal
    assert seen is not None
    for count, told in ((12, None), (13, "1 more case: "), (17, "5 more cases: ")):
        many = replace(plan, rehearsal=replace(seen, cases=seen.cases * count))
        blocks = became_blocks(many, None)
        table = next(one for one in blocks if isinstance(one, Table))
        assert table.columns[0].title == "case"
        assert len(table.rows) == 12
        said = [
            one.text for one in blocks if isinstance(one, Paragraph) and "more case" in one.text
        ]
        assert [text[: len(told or "")] for text in said] == ([told] if told else [])
