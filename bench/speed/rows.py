"""Rows of published speeds: facts, each with its source, in `rows.jsonl`."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import msgspec

from turbofit.core.presets import load_yaml
from turbofit.core.struct import Struct

HERE = Path(__file__).resolve().parent


class Row(Struct):
    """One published figure: requests or output tokens a second; a source may give both.

    ``name`` and ``card`` are the source's words; ``model``, ``packed`` and ``on`` what turbofit
    takes for them, as in `bench/accuracy`. ``account``: the version whose account of the cache is
    taken, where the source's scripts say another than its page; ``settings`` are of that account.
    ``concurrency`` are requests that are there at any time; None: as many as the batch. ``prompt``
    and ``output`` are mean tokens, ``spread`` the squared coefficient of variation of an answer's
    length, ``together``: all requests start at the same moment. ``why``: on what that rests.
    ``unseen``: the row judges and fits nothing, since it stands for cards that no fit has seen.
    ``prompts`` is how many requests a benchmark sent in all.

    Of images: the ``sizes`` in pixels of the pictures that were sent, in equal shares, one a
    request; what turbofit was told (``prefill``, ``context``); and the ``threads`` that prepared
    them, LMDeploy's ``by_float`` or by a table, 0 where the host is not in the figure; ``decoded``
    pictures came without JPEG. ``limit`` is another than the model's own. ``tower``: the figure is
    of the vision tower alone. ``past`` says why a row is of code that LMDeploy 0.18 has no more:
    it is shown, and is no figure of a kind.
    """

    id: str
    source: str
    engine: str
    version: str
    name: str
    card: str
    model: str
    on: str
    prompt: float
    output: float
    why: str
    packed: str = ""
    tp: int = 1
    account: str = ""
    settings: dict[str, float] = msgspec.field(default_factory=dict)
    quant_policy: int = 0
    concurrency: int | None = None
    batch: int | None = None
    assumed_lengths: bool = False
    spread: float = 0.0
    together: bool = False
    unseen: bool = False
    requests_per_second: float | None = None
    output_tokens_per_second: float | None = None
    seconds_to_first_token: float | None = None
    prompts: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    prefill: int = 8192
    context: int = 32768
    threads: int = 0
    by_float: bool = False
    decoded: bool = False
    limit: int | None = None
    tower: bool = False
    judges: bool = False
    past: str = ""

    @property
    def of_lmdeploy(self) -> bool:
        """Whether LMDeploy ran the row; rows of other engines are shown, but not fitted."""
        return self.engine in ("turbomind", "pytorch")


class WithdrawnError(Exception):
    """A row's source was withdrawn by its author."""


def lines_of() -> list[str]:
    """Return the lines of all rows of text, then of all rows of images."""
    files = (HERE / "rows.jsonl", HERE / "images.jsonl")
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def read_rows() -> list[Row]:
    """Return all rows.

    Raises:
        WithdrawnError: the source of a row is listed in `withdrawn.yaml`.
    """
    rows = [msgspec.json.decode(line, type=Row) for line in lines_of()]
    withdrawn = load_yaml(HERE / "withdrawn.yaml")
    for row, (source, why) in product(rows, withdrawn.items()):
        if row.source.startswith(source):
            raise WithdrawnError(f"{row.id}: {source} was withdrawn: {why}")
    return rows
