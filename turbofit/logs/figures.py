"""A row's answer, and the figures that rows of `presets/causes.yaml` name."""

from __future__ import annotations

import re
from string import Formatter
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.process.hidden import without_keys
from turbofit.core.struct import NA
from turbofit.core.units import format_bytes
from turbofit.logs.causes import Kind, release_of, table
from turbofit.logs.draft import Draft, evidence, raised_in
from turbofit.memory.versions import listed_since, written
from turbofit.planning.commands import option_since

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from turbofit.logs.case import LogCase
    from turbofit.logs.causes import Hit, Sentence
    from turbofit.logs.facts import LogEvent

#: Builds for CUDA up to 12.6 know no card from here on.
_FIRST_OF_CUDA_12_8: Final = 100
_FIRST_WITH_BFLOAT16: Final = 80


def figures_of(case: LogCase, mark: LogEvent, hit: Hit) -> dict[str, Any]:
    """What a row may name, by name; None is what the log has not enough for.

    It is what the row's pattern and the log's facts caught, a number as one, and what they come to.
    """
    subject = case.subject
    told = {**subject.options, **subject.facts, **hit.fields, "said": hit.said}
    told = {
        name: int(text) if isinstance(text, str) and text.isdecimal() else text
        for name, text in told.items()
    }
    return {**told, **_of_cards(case, told), **_of_releases(case, mark, told)}


def _of_cards(case: LogCase, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the log, or else the machine, says of its cards; ``arch`` is 86 for 8.6."""
    arch, model, gpu = told.get("arch"), case.model, case.gpu
    if arch is None and gpu and gpu.compute_capability != NA:
        arch = gpu.compute_capability[0] * 10 + gpu.compute_capability[1]
    built = list(map(int, re.findall(r"(?:sm|compute)_(\d+)", str(told.get("built") or ""))))
    figures = {
        "arch": arch,
        "no_bfloat16": arch if arch and arch < _FIRST_WITH_BFLOAT16 else None,
        "built_newest": max(built, default=None),
        "built_oldest": min(built, default=None),
        # Newer than the build that the log names, or than all up to CUDA 12.6.
        "too_new": (arch or 0) > max(built, default=_FIRST_OF_CUDA_12_8 - 1) or None,
        "too_old": (arch is not None and arch < min(built, default=0)) or None,
        "linear_on_h20": told.get("linear") if gpu and "H20" in gpu.name else None,
        "visible": case.subject.visible,
        # The cards beside the first, where several are visible and no degree was given.
        "unused_gpus": ("tp" not in case.subject.options and (case.subject.visible or 1) > 1)
        or None,
        "fits_one": None,
        "fits_none": None,
    }
    if model is not None and gpu is not None:
        one = model.weight_bytes < gpu.usable
        figures["fits_one" if one else "fits_none"] = (
            f"{model.name} is {format_bytes(model.weight_bytes)} of weights, and"
            f" {'one' if one else 'each'} of the cards has {format_bytes(gpu.usable)}"
        )
    return figures


def _of_releases(case: LogCase, mark: LogEvent, told: Mapping[str, Any]) -> dict[str, Any]:
    """What releases of LMDeploy and Transformers have of what the line asks for."""
    option, value, version = told.get("option"), told.get("value"), case.subject.version
    # A usage error names an option, or an argument with the value that is refused.
    asked = option or (f"{told.get('argument')} {value}" if value else None)
    written_so = str(option or "").replace("_", "-")
    named = (told.get(field) for field in ("type", "name", "imported"))
    name = str(next(filter(None, named), ""))
    since = listed_since(told.get("architecture") or "")
    own = mark.stack and re.search(r"[/\\]lmdeploy[/\\]", mark.stack[-1].path)
    return {
        "asked_option": asked,
        "option_since": option_since(tuple(str(asked or "").split())),
        "option_written": written_so
        if written_so != str(option or "") and option_since((written_so,))
        else None,
        "brought": release_of(name, dropped=False),
        "dropped": release_of(name, dropped=True),
        "listed_since": since,
        "too_old_for": version if since and version and written(version) < written(since) else None,
        "newer_lmdeploy": "a newer LMDeploy" if own else None,
    }


def sentence(text: Sentence, known: Mapping[str, Any]) -> str:
    """A sentence with its figures; its second form where one of them is not known."""
    first, second = (text, text) if isinstance(text, str) else text
    form = second if any(known.get(name) is None for name in names_of(first)) else first
    values = {name: known.get(name) for name in names_of(form)}
    shown = {name: "?" if value is None else value for name, value in values.items()}
    return without_keys(form.format(**shown)) if form else ""


def names_of(text: str) -> set[str]:
    """The figures that a sentence names."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def explanation_of(mark: LogEvent, case: LogCase) -> Draft | None:
    """The first row for an event whose condition holds; None: none does."""
    asked = ((hit, figures_of(case, mark, hit)) for hit in mark.hits)
    for hit, known in asked:
        row, when = hit.row, hit.row.when
        if not when or known.get(when) is not None:
            break
    else:
        return None

    def said(texts: Iterable[Sentence]) -> tuple[str, ...]:
        return tuple(filter(None, (sentence(text, known) for text in texts)))

    kind, what = table().kinds.get(row.kind, Kind()), sentence(row.what, known)
    return Draft(
        kind=row.kind,
        line=mark.line,
        phase=(row.phase or kind.phase) if what else "unknown",
        what=what,
        rank=row.rank,
        why=said(row.why) if what else raised_in(mark),
        possible=said(row.possible),
        changes=said(row.change),
        unknown=said(row.unknown),
        evidence=(evidence(mark, "the message"),),
        planned=kind.plan,
    )
