"""Blocks as text in a terminal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from turbofit.report.painters.document import (
    Code,
    Column,
    FactList,
    Heading,
    Items,
    Paragraph,
    Table,
)
from turbofit.report.painters.terminal import clean, paint

words = st.text(alphabet="abc xyz-_/", max_size=60)


def test_columns_line_up_and_the_wrapped_one_gives_way() -> None:
    table = Table(
        columns=(
            Column(title="name"),
            Column(title="MiB", right=True),
            Column(title="note", wrap=True),
        ),
        rows=(("a", "1.0", "word " * 30), ("long name", "1,000.0", "")),
    )
    lines = paint([table], width=60).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0] == "  name           MiB  note"
    assert lines[1].startswith("  a              1.0  word word")
    assert lines[-1].split() == ["long", "name", "1,000.0"]


def test_control_characters_of_others_never_reach_the_terminal() -> None:
    evil = "name\x1b[2Jx\x07\x9b31m\r\n"
    blocks = [
        Heading(evil),
        Paragraph(evil),
        Items((evil,)),
        FactList(((evil, evil),)),
        Table(columns=(Column(title="t"),), rows=((evil,),)),
        Code(evil),
    ]
    assert not set(paint(blocks)) & {"\x1b", "\x07", "\x9b", "\r"}
    assert clean(evil) == "name?[2Jx??31m??"


def test_colour_only_when_asked() -> None:
    blocks = [Heading("head"), Paragraph("bad", tone="bad"), Items(("w",), tone="warn")]
    assert "\x1b" not in paint(blocks)
    coloured = paint(blocks, colour=True)
    assert "\x1b[31mbad\x1b[0m" in coloured
    assert "\x1b[1mhead\x1b[0m" in coloured


@given(
    rows=st.lists(st.tuples(words, words, words), max_size=6),
    width=st.integers(min_value=60, max_value=120),
)
def test_no_text_is_lost(rows: list[tuple[str, str, str]], width: int) -> None:
    columns = (Column(title="a", wrap=True), Column(title="b"), Column(title="c", wrap=True))
    text = paint([Table(columns=columns, rows=tuple(rows))], width=width)
    for row in rows:
        for cell in row:
            for word in cell.split():
                assert word in text


def test_wide_characters_take_two_columns() -> None:
    def columns(text: str) -> int:
        return sum(2 if one >= "\u2e80" else one != "\u0301" for one in text)

    table = Table(
        columns=(Column(title="model", wrap=True), Column(title="size", right=True)),
        rows=(("书生万象", "1.0"), ("cafe\u0301", "20.0"), ("python", "300.0")),
    )
    lines = paint([table]).splitlines()
    assert len({columns(line) for line in lines}) == 1
    text = paint([Paragraph("书生万象 fits: " * 20), FactList((("显存", "x y " * 40),))])
    assert max(map(columns, text.splitlines())) <= 80
    assert text.split() == ["书生万象", "fits:"] * 20 + ["显存"] + ["x", "y"] * 40


def test_names_neither_turn_the_text_nor_end_its_line() -> None:
    assert clean("a\u202eb\u2066c\u2028d") == "a?b?c?d"
    assert paint([Code("serve a\u2028b\nc")]) == "  serve a?b\n  c\n"
