"""A row's answer, and the figures that rows of `presets/causes.yaml` name."""

from __future__ import annotations

import math
import re
from string import Formatter
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.process.hidden import without_keys
from turbofit.core.struct import NA
from turbofit.core.units import format_bytes
from turbofit.diagnose.causes import kind_of, release_of
from turbofit.diagnose.draft import Draft, evidence, raised_in
from turbofit.memory.versions import listed_since, written
from turbofit.planning.commands import option_since

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.causes import Hit, Sentence, When
    from turbofit.diagnose.facts import LogEvent
    from turbofit.observe.log_events import PythonFrame

#: Folders of packages whose versions must go together, and of checkpoints' own code.
_FOLDERS: Final = re.compile(
    r"[/\\](transformers|lmdeploy|swift|xtuner|vlmeval|opencompass|lagent|xinference)[/\\]"
    r"|(transformers_modules)"
)
#: Builds for CUDA up to 12.6 know no card from here on.
_FIRST_OF_CUDA_12_8: Final = 100


class Figures:
    """Names that a row may use: what its pattern and the log's facts caught, and `FIGURES`.

    Args:
        case: the log.
        mark: the event.
        hit: the row, and what it caught of the event's line.
    """

    def __init__(self, case: LogCase, mark: LogEvent, hit: Hit) -> None:
        self.case, self.stack, self.hit = case, mark.stack, hit
        subject = case.subject
        self._caught = {**subject.options, **subject.facts, **hit.fields}

    def get(self, name: str) -> Any:
        """A figure or fact; None where the log has not enough for it."""
        if name in FIGURES:
            return FIGURES[name](self)
        return self.of_line(name)

    def of_line(self, name: str) -> Any:
        """What the row's pattern or a fact's caught under a name, a number as one."""
        text = self._caught.get(name)
        return int(text) if isinstance(text, str) and text.isdecimal() else text

    def holds(self, when: When | None) -> bool:
        """Whether a row's condition holds."""
        value = self.get(when.fact) if when else None
        if when is None or value is None:
            return when is None
        below = when.below is None or value < when.below
        return below and (not when.values or value in when.values)

    def sentence(self, sentence: Sentence) -> str:
        """A sentence with its figures; its second form where one of them is not known."""
        first, second = (sentence, sentence) if isinstance(sentence, str) else sentence
        values = {name: self.get(name) for name in names_of(first)}
        if None in values.values():
            first, values = second, {name: self.get(name) for name in names_of(second)}
        known = {name: "?" if value is None else value for name, value in values.items()}
        return without_keys(first.format(**known)) if first else ""

    def sentences(self, texts: Iterable[Sentence]) -> tuple[str, ...]:
        return tuple(filter(None, map(self.sentence, texts)))


def names_of(sentence: str) -> set[str]:
    """The figures that a sentence names."""
    return {name for _, name, _, _ in Formatter().parse(sentence) if name}


def _arch(figures: Figures) -> int | None:
    """The card's compute capability, 86 for 8.6: the log's, else the machine's."""
    told = figures.of_line("arch")
    if told is None and figures.case.gpu and figures.case.gpu.compute_capability != NA:
        major, minor = figures.case.gpu.compute_capability
        return major * 10 + minor
    return told if isinstance(told, int) else None


def _built(figures: Figures) -> list[int]:
    text = str(figures.of_line("built") or "")
    return list(map(int, re.findall(r"(?:sm|compute)_(\d+)", text)))


def _too_old_for(figures: Figures) -> str | None:
    """The log's LMDeploy, where it is older than the first that runs the architecture."""
    since, version = figures.get("listed_since"), figures.case.subject.version
    return version if since and version and written(version) < written(since) else None


def _released(figures: Figures, *, dropped: bool) -> str | None:
    """The release of Transformers that brought, or dropped, the name that the line asks for."""
    names = (figures.of_line(field) for field in ("type", "name", "imported"))
    return next((release_of(str(name), dropped=dropped) for name in names if name), None)


def _fits(figures: Figures, *, one: bool) -> str | None:
    """Whether one of the cards holds the weights, in words; None if it is not so, or not known."""
    model, gpu = figures.case.model, figures.case.gpu
    if model is None or gpu is None or (model.weight_bytes < gpu.usable) != one:
        return None
    weights, card = format_bytes(model.weight_bytes), format_bytes(gpu.usable)
    which = "one" if one else "each"
    return f"{model.name} is {weights} of weights, and {which} of the cards has {card}"


def _option_written(figures: Figures) -> str | None:
    """How LMDeploy writes the option, where only its dashes differ."""
    option = str(figures.of_line("option") or "").replace("_", "-")
    return option if option != figures.of_line("option") and option_since((option,)) else None


def _asked_option(figures: Figures) -> str | None:
    """The option of a usage error, with its value where that is refused."""
    option, value = figures.of_line("option"), figures.of_line("value")
    return str(option) if option else f"{figures.of_line('argument')} {value}" if value else None


def package_of(stack: tuple[PythonFrame, ...]) -> str | None:
    """The innermost package of an engine or of a checkpoint's own code on a stack."""
    searches = (_FOLDERS.search(frame.path) for frame in reversed(stack))
    return next((match[match.lastindex or 0] for match in searches if match), None)


def _raised_by(figures: Figures) -> str | None:
    """The package whose code raised the error; None: another package.

    Without a stack "unknown", where the log names LMDeploy.
    """
    if figures.stack:
        return package_of(figures.stack[-1:])
    return "unknown" if figures.case.subject.of_lmdeploy else None


#: By name; a row uses them in its sentences and conditions.
FIGURES: Final[dict[str, Callable[[Figures], Any]]] = {
    "arch": _arch,
    "brought": lambda figures: _released(figures, dropped=False),
    "built_newest": lambda figures: max(_built(figures), default=None),
    "built_oldest": lambda figures: min(_built(figures), default=None),
    "fits_none": lambda figures: _fits(figures, one=False),
    "fits_one": lambda figures: _fits(figures, one=True),
    "function": lambda figures: figures.stack[-1].function if figures.stack else None,
    "asked_option": _asked_option,
    "linear_on_h20": lambda figures: (
        figures.of_line("linear") if figures.case.gpu and "H20" in figures.case.gpu.name else None
    ),
    "dropped": lambda figures: _released(figures, dropped=True),
    "listed_since": lambda figures: listed_since(figures.of_line("architecture") or ""),
    "newer_lmdeploy": lambda figures: (
        "a newer LMDeploy" if _raised_by(figures) == "lmdeploy" else None
    ),
    "option_since": lambda figures: option_since(tuple((_asked_option(figures) or "").split())),
    "option_written": _option_written,
    "package": lambda figures: package_of(figures.stack),
    "raised_by": _raised_by,
    "said": lambda figures: figures.hit.said,
    # Newer than the build that the log names, or than all up to CUDA 12.6.
    "too_new": lambda figures: (
        (_arch(figures) or 0) > max(_built(figures), default=_FIRST_OF_CUDA_12_8 - 1) or None
    ),
    "too_old": lambda figures: (
        (_arch(figures) or math.inf) < min(_built(figures), default=0) or None
    ),
    "too_old_for": _too_old_for,
    # The cards beside the first, where several are visible and no degree was given.
    "unused_gpus": lambda figures: (
        None
        if "tp" in figures.case.subject.options
        else max(0, (figures.case.subject.visible or 1) - 1) or None
    ),
    "visible": lambda figures: figures.case.subject.visible,
}


#: An exception of Python, and what a shell says of its child: alone in a log it is all there is.
_ALONE: Final = re.compile(
    r"\s*(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b"
    r"|(?:\S+: line \d+: +\d+ )?(?:Killed|Aborted|Segmentation fault|Bus error|Illegal instruction)"
    r"(?: \(core dumped\))?\s*$|.{0,120}?: (?:command )?not found|curl: \(7\)"
    r"|.{0,120}?\b[Ee]xited (?:with code |\()13[479]\b"
    r"|No devices were found"
)
_FEW: Final = 3


def explanation_of(mark: LogEvent, case: LogCase) -> Draft | None:
    """The first row for an event whose condition holds; None: none does.

    Common kinds are asked of a log about inference, or where the error is all that there is:
    PostgreSQL, nginx and systemd have the same words for other things.
    """
    alone = case.facts.rows <= _FEW + 2 * len(mark.stack) and _ALONE.match(mark.text) is not None
    common = case.subject.of_inference or alone
    asked = (Figures(case, mark, hit) for hit in mark.hits if common or not kind_of(hit.row).common)
    figures = next((one for one in asked if one.holds(one.hit.row.when)), None)
    if figures is None:
        return None
    row, kind = figures.hit.row, kind_of(figures.hit.row)
    what = figures.sentence(row.what)
    return Draft(
        kind=row.kind,
        line=mark.line,
        phase=(row.phase or kind.phase) if what else "unknown",
        what=what,
        rank=row.rank,
        why=figures.sentences(row.why) if what else raised_in(mark),
        possible=figures.sentences(row.possible),
        changes=figures.sentences(row.change),
        unknown=figures.sentences(row.unknown),
        evidence=(evidence(mark, "the message"),),
        planned=kind.plan,
    )
