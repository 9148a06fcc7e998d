"""Rows of published speeds, and what is known of their workloads."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
import yaml

from turbofit.core.struct import Struct

__all__ = ["HERE", "OBSERVATIONS", "Load", "Row", "load_of", "read_rows"]

HERE = Path(__file__).resolve().parent
#: Beside the checkout: the rows are no part of the repository.
OBSERVATIONS = HERE.parents[2] / "shared" / "observations" / "speed.jsonl"

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Row(Struct):
    """One published figure: requests or output tokens a second; a source may give both.

    ``concurrency`` are requests that are there at any time; None: as many as the batch.
    """

    id: str
    source: str
    engine: str
    engine_version: str
    model: str
    card: str
    tp: int = 1
    concurrency: int | None = None
    max_batch_size: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    requests_per_second: _Positive | None = None
    output_tokens_per_second: _Positive | None = None
    seconds_to_first_token: float | None = None
    quant_policy: int = 0
    cache_max_entry_count: float | None = None

    @property
    def of_lmdeploy(self) -> bool:
        """Whether LMDeploy ran it; others are shown beside it and fitted to nothing."""
        return self.engine in ("turbomind", "pytorch")


class Load(Struct):
    """What `sources.yaml` says of rows: see there.

    ``prompt`` and ``output`` are mean tokens, ``spread`` is the squared coefficient of variation of
    an answer's length. ``together``: all requests start at the same moment. ``model`` and ``card``
    are turbofit's names. ``why`` says on what all this rests.
    """

    source: str
    why: str
    ids: tuple[str, ...] = ("",)
    prompt: float | None = None
    output: float | None = None
    spread: float = 0.0
    together: bool = False
    model: str | None = None
    card: str | None = None


def read_rows(path: Path = OBSERVATIONS) -> list[Row]:
    """All rows of a file; fields that no forecast needs are ignored.

    Raises:
        ValueError: a line is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(msgspec.json.decode(line, type=Row))
            except msgspec.MsgspecError as exc:
                raise ValueError(f"{path.name}:{number}: not a row: {exc}") from None
    return rows


def load_of(row: Row) -> Load:
    """The entry of a row; the last one fits all."""
    return next(one for one in _loads() if one.source in row.source and row.id.startswith(one.ids))


@cache
def _loads() -> tuple[Load, ...]:
    text = (HERE / "sources.yaml").read_text(encoding="utf-8")
    return msgspec.convert(yaml.safe_load(text), tuple[Load, ...])
