"""What the rows of `presets/causes.yaml` compute: figures of sentences and of conditions."""

from __future__ import annotations

import math
import re
from string import Formatter
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.struct import NA
from turbofit.core.units import GIB
from turbofit.core.version import REFERENCE
from turbofit.diagnose.answer import Missing
from turbofit.diagnose.rules.causes import Condition, matches
from turbofit.diagnose.rules.draft import RuleAnswer, evidence, raised_in, without_secrets
from turbofit.memory.versions import listed_since, listings, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from re import Match, Pattern

    from turbofit.diagnose.case import LogCase
    from turbofit.diagnose.facts import LogEvent, LogFacts
    from turbofit.observe.log_events import PythonFrame

#: Folders of the packages whose versions must go together, and of checkpoints' own code.
_FOLDERS: Final = re.compile(
    r"[/\\](transformers|lmdeploy|vllm|sglang)[/\\]|(transformers_modules)"
)
#: LMDeploy's own parts, and the one front end of which a failure was seen.
_PART: Final = re.compile(
    r"lmdeploy[/\\](?:vl[/\\]model[/\\](llava_hf)\.py|(turbomind|pytorch|lite|vl|serve)[/\\])"
)
#: One look-up alone in a line: of several nobody knows which failed.
_LOOKED_UP: Final = re.compile(r"[^\[]*?\b(?!environ\b)([A-Za-z_]\w{2,60})\[[^\[]*")
#: Not of what was waited for, or of what a client asked.
_RAISES: Final = re.compile(
    r"raise (?:\w+\.)*((?!\w*(?:Timeout|Connection|HTTP|Cancel|Dead|Exit))[A-Z]\w*)\("
    r"(?!.*\bfrom \w+$)"
)
#: A sentence for users of one program.
_OF_PROGRAM: Final = re.compile(
    r"(?:of |for |in |under )?(?:pip install (?:-U |--force-reinstall ))?(LMDeploy|vLLM|SGLang)\b",
    re.IGNORECASE,
)
#: Kinds that tell of memory: where the message has no sizes, the answer says so.
_OF_MEMORY: Final = ("no_kv_memory", "out_of_memory", "host_out_of_memory", "card_occupied")


class Figures:
    """Names that a row may use: what its pattern and the log's facts caught, and `FIGURES`.

    Args:
        case: the log.
        mark: the event.
        match: the row's pattern in its line.
    """

    def __init__(self, case: LogCase, mark: LogEvent, match: Match[str]) -> None:
        caught = {name: text for name, text in match.groupdict().items() if text is not None}
        self.case, self.mark, self.matched = case, mark, match[0]
        subject = case.facts.subject
        self._caught = {**subject.options, **subject.facts, **caught}
        self._groups = [group for group in match.groups() if group]

    def get(self, name: str) -> Any:
        """A figure or fact; None where the log has not enough for it."""
        if name in FIGURES:
            return FIGURES[name](self)
        text = self._caught.get(name)
        return int(text) if isinstance(text, str) and text.isdecimal() else text

    def number(self, name: str) -> float | None:
        """A fact as a number, of which texts write thousands with commas."""
        text = self._caught.get(name)
        try:
            return None if text is None else float(str(text).replace(",", ""))
        except ValueError:
            return None

    def holds(self, fact: str, wanted: Condition) -> bool:
        """Whether a fact is as a condition says: by its relations, or absent (or not)."""
        value = self.get(fact)
        if "absent" in wanted:
            return wanted["absent"] is (value is None)
        for relation, other in wanted.items():
            named = isinstance(other, str) and relation not in ("equal", "matches")
            bound = self.get(other) if named else other
            if value is None or bound is None or not _RELATIONS[relation](value, bound):
                return False
        return True

    def sentence(self, text: str) -> str | None:
        """A sentence with its figures; None where one of them is not known."""
        named = {name for _, name, _, _ in Formatter().parse(text) if name and not name.isdigit()}
        values = {name: self.get(name) for name in named}
        if None in values.values():
            return None
        filled = text.format(*self._groups, *("",) * 6, **values)
        return without_secrets(filled.replace(" ()", "").rstrip(": "))

    def sentences(self, texts: Iterable[str]) -> tuple[str, ...]:
        """Those whose figures are known, without advice for users of other programs."""
        known = tuple(sentence for text in texts if (sentence := self.sentence(text)) is not None)
        return tuple(text for text in known if not self._of_another(text)) or known

    def _of_another(self, text: str) -> bool:
        """Whether the log names programs, but not the one for whose users a sentence is."""
        programs, match = self.case.facts.subject.programs, _OF_PROGRAM.match(text)
        return match is not None and bool(programs) and match[1].lower() not in programs

    def missing(self, kind: str) -> Missing | None:
        """The bytes that were missing, by the log's own figures."""
        size = self.get("short")
        if size is not None and size > 0:
            note = "by the sizes that the log prints"
            return Missing(bytes=size, basis="log", note=note, doubt=GIB // 100)
        if kind in _OF_MEMORY:
            return Missing(bytes=None, basis="unknown", note="the message has no sizes")
        return None


def _short(figures: Figures) -> int | None:
    """Bytes: what was needed less what there was, or what vLLM's budget lacks for any cache."""
    needed, available = figures.number("needed_gib"), figures.number("available_gib")
    if needed is not None and available is not None:
        return round((needed - available) * GIB)
    rest = figures.number("rest_gib")
    return round(-rest * GIB) if rest is not None and rest < 0 else None


def _short_gib(figures: Figures) -> str | None:
    short = _short(figures)
    return None if short is None or short <= 0 else f"{short / GIB:.2f} GiB"


def _utilization(figures: Figures) -> str | None:
    """The largest --gpu-memory-utilization that what is free allows; rounded down."""
    free, total = figures.number("available_gib"), figures.number("total_gib")
    return None if not free or not total else f"{math.floor(free / total * 1000) / 1000:g}"


def _utilization_needed(figures: Figures) -> str | None:
    """The least --gpu-memory-utilization that leaves any cache; rounded up."""
    total = figures.number("total_gib")
    parts = [figures.number(name) for name in ("weights_gib", "other_gib", "peak_gib")]
    known = [part for part in parts if part is not None]
    if not total or len(known) != len(parts):
        return None
    share = math.ceil(sum(known) / total * 10_000) / 10_000
    return f"{share:g}" if share < 1 else None


def _arch(figures: Figures) -> int | None:
    """The card's compute capability, 86 for 8.6: the log's, else the machine's."""
    capability = figures.number("arch")
    if capability is None and figures.case.gpu and figures.case.gpu.compute_capability != NA:
        major, minor = figures.case.gpu.compute_capability
        capability = major * 10 + minor
    return None if capability is None else round(capability)


def _built(figures: Figures) -> list[int]:
    text = figures.get("built") or ""
    return list(map(int, re.findall(r"(?:sm|compute)_(\d+)", text)))


def _listed_since(figures: Figures) -> str | None:
    """The release from which LMDeploy runs the architecture that the line names, if it does."""
    name = figures.get("architecture")
    return listed_since(name) if name else None


def _too_old_for(figures: Figures) -> str | None:
    """The log's LMDeploy, where it is older than the first that runs the architecture."""
    since, version = _listed_since(figures), figures.case.facts.subject.version
    return version if since and version and written(version) < written(since) else None


def _meant(figures: Figures) -> str | None:
    """The architecture that a name means, of whose letters only the writing differs."""
    name = str(figures.get("name") or "")
    known = {
        _letters(arch): arch for engine in ("turbomind", "pytorch") for arch in listings(engine)
    }
    architecture = known.get(_letters(name))
    return None if architecture == name else architecture


def _letters(name: str) -> str:
    return name.replace("_", "").lower()


def _table(figures: Figures) -> str | None:
    """That in which a package's code looked up a key."""
    stack = figures.mark.stack
    match = _LOOKED_UP.fullmatch(stack[-1].code) if package_of(stack[-1:]) else None
    return match[1] if match else None


def _divisor(figures: Figures) -> int | None:
    """The largest power of two below the tensor parallel size asked that divides the heads.

    Key heads and vocabularies are divided too, and are multiples of such sizes.
    """
    count, tp = figures.number("count"), figures.number("tp")
    if not count or not tp:
        return None
    return next((size for size in (32, 16, 8, 4, 2) if size < tp and count % size == 0), 1)


def package_of(stack: tuple[PythonFrame, ...]) -> str | None:
    """The innermost package of an engine or of a checkpoint's own code on a stack."""
    return _innermost(_FOLDERS, stack)


def refused_by(stack: tuple[PythonFrame, ...], error: str) -> str | None:
    """The engine, or checkpoint's own code, that raised an error by its own sentence."""
    code = stack[-1].code if stack else ""
    raised = _RAISES.match(code)
    by_name = raised[1] if raised else "AssertionError" if code.startswith("assert ") else ""
    return package_of(stack[-1:]) if by_name and error.endswith(by_name) else None


def _innermost(pattern: Pattern[str], stack: tuple[PythonFrame, ...]) -> str | None:
    """What the group of a pattern catches of the innermost path that it matches."""
    searches = (pattern.search(frame.path) for frame in reversed(stack))
    return next((match[match.lastindex or 0] for match in searches if match), None)


def _raised_by(figures: Figures) -> str | None:
    """The package whose code raised the error; None: another package.

    Without a stack "unknown", where the log names a program.
    """
    stack = figures.mark.stack
    if stack:
        return package_of(stack[-1:])
    return "unknown" if figures.case.facts.subject.programs else None


def _model_name(figures: Figures) -> str:
    model = figures.case.model
    return (model.hub_id if model is not None else None) or "MODEL"


def _tried(figures: Figures) -> str | None:
    """What to install, or that nothing helps, where `bench.compatibility` saw such a failure.

    LMDeploy's version is the log's, else turbofit's reference.
    """
    error, model = figures.get("error") or figures.matched, figures.case.model
    in_llava = _innermost(_PART, figures.mark.stack) == "llava_hf"
    family = "LlavaForConditionalGeneration" if in_llava else None
    family = family or (model.architecture if model else None)
    if family is None:
        return None
    from turbofit.planning.compatibility import EFFECTS, FrontEnd, compatibility, install_line

    lmdeploy = figures.case.facts.subject.version or REFERENCE
    name = model.name if model else "this model"
    failed = {arch for failure in compatibility().failures for arch in failure.architectures}
    for architecture in sorted(arch for arch in failed if arch.partition("+")[0] == family):
        for engine in compatibility().families:
            front = FrontEnd(lmdeploy, architecture, engine)
            failure = front.failed_with(error)
            if failure is None:
                continue
            oldest = front.oldest_allowed()
            every = (f"transformers>={oldest}",) if oldest else ()
            if wanted := install_line(front.requirements() or every):
                return f"{wanted}: with these LMDeploy {lmdeploy} runs {name}"
            return (
                f"turbofit serve --engine transformers: LMDeploy {lmdeploy}"
                f" {EFFECTS[failure.step]} ({name}), whichever version of Transformers was tried"
            )
    return None


#: By name; a row uses them in its sentences and conditions.
FIGURES: Final[dict[str, Callable[[Figures], Any]]] = {
    "arch": _arch,
    "built_newest": lambda figures: max(_built(figures), default=None),
    "built_oldest": lambda figures: min(_built(figures), default=None),
    "divisor": _divisor,
    "listed_since": _listed_since,
    "meant": _meant,
    "model_name": _model_name,
    "raised_at": lambda figures: figures.mark.stack[-1].code if figures.mark.stack else None,
    "raised_by": _raised_by,
    "raised_in": lambda figures: figures.mark.stack[-1].function if figures.mark.stack else None,
    "part_of_lmdeploy": lambda figures: _innermost(_PART, figures.mark.stack),
    "package": lambda figures: package_of(figures.mark.stack),
    "short": _short,
    "short_gib": _short_gib,
    "table": _table,
    "too_old_for": _too_old_for,
    "tried": _tried,
    "unmeasured": lambda figures: None if figures.get("weights_gib") else "",
    "untried": lambda figures: "" if _tried(figures) is None else None,
    "utilization": _utilization,
    "utilization_needed": _utilization_needed,
}
_RELATIONS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "below": lambda value, bound: bool(value < bound),
    "above": lambda value, bound: bool(value > bound),
    "equal": lambda value, bound: bool(value == bound),
    "within": lambda value, bound: value in bound,
    "matches": lambda value, bound: re.match(bound, value) is not None,
}


#: An exception of Python, what a shell says of its child, and sentences of Docker, NVIDIA's tools,
#: systemd, pip and curl: whatever they ran, the answer is what they say.
_ALONE: Final = re.compile(
    r"\s*(?!(?:java|javax|org|com|net|io|scala)\.)(?:[A-Za-z_]\w*\.)*"
    r"[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b"
    r"|(?:\S+: line \d+: +\d+ )?(?:Killed|Aborted|Segmentation fault|Bus error|Illegal instruction)"
    r"(?: \(core dumped\))?\s*$"
    r"|.{0,120}?(?:Error response from daemon|\b[Dd]ocker(?:: | daemon)|exec format error"
    r"|\bmanifest for |pull access denied|pull rate limit|\b[Ee]xited (?:with code |\()13[79]\b"
    r"|No devices were found|RmInitAdapter failed|: (?:command )?not found"
    r"|\.service: .{0,120}(?:9/KILL|OOM killer)|fatal error: Python\.h|curl: \(7\)"
    r"|externally-managed-environment|(?:Failed b|B)uilding wheel|Could not build wheels"
    r"|is not a supported wheel|ResolutionImpossible|requires a different Python)"
)
_FEW: Final = 3


def _is_alone(mark: LogEvent, facts: LogFacts) -> bool:
    """Whether an error is all that a log has, beside its traceback and a line or two."""
    few = facts.rows_beside <= _FEW and _ALONE.match(mark.text) is not None
    return few and (not mark.stack or facts.errors == 1)


def explanation_of(mark: LogEvent, case: LogCase) -> RuleAnswer | None:
    """The first row of `causes.yaml` for an event whose conditions hold; None: none does.

    Common messages are asked of a log about inference, or where the error is all that there is:
    PostgreSQL, nginx and systemd have the same words for other things.
    """
    common = case.facts.subject.of_inference or _is_alone(mark, case.facts)
    for cause, match in matches(mark.text):
        if cause.common and not common:
            continue
        figures = Figures(case, mark, match)
        if all(figures.holds(fact, wanted) for fact, wanted in cause.when.items()):
            what = figures.sentence(cause.what) or ""
            return RuleAnswer(
                kind=cause.kind,
                line=mark.line,
                phase=cause.phase,
                what=what,
                rank=cause.rank,
                why=figures.sentences(cause.why) if what else raised_in(mark),
                possible=figures.sentences(cause.possible),
                missing=figures.missing(cause.kind),
                changes=figures.sentences(cause.change),
                unknown=figures.sentences(cause.unknown),
                evidence=(evidence(mark, "the message"),),
                planned=cause.planned,
            )
    return None
