"""Makes the possible answers to one run of a log.

`answer_to_line` decides the answer to a line, by a row of `presets/causes.yaml`. Two kinds of lines
have no row: a lack of GPU memory, which `out_of_memory` answers, and a kill by the kernel. A hang
and a log without a fault have answers, too. Of several answers `explain` takes the best.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import gcd
from string import Formatter
from typing import Any, Final

from msgspec.structs import replace

from turbofit.core.struct import NA
from turbofit.core.units import format_bytes
from turbofit.core.version import REFERENCE
from turbofit.logs import log_events as events
from turbofit.logs.answer import Draft, Holding, Missing, evidence, raised_in
from turbofit.logs.case import LogCase
from turbofit.logs.causes import Hit, Kind, Rank, Row, Sentence, release_of, table, text_of
from turbofit.logs.death import IN_DIAGNOSIS, death
from turbofit.logs.facts import LogEvent, LogFacts, tells_of_memory
from turbofit.logs.keys import without_keys
from turbofit.logs.out_of_memory import lack_in_words, lack_of_memory
from turbofit.logs.whose_fault import WhoseFault, owner_of, whose_fault
from turbofit.memory.versions import listed_since, not_listed, written
from turbofit.planning.commands import option_since

#: The first compute capability (10.0) without kernels in builds for CUDA up to 12.6.
_FIRST_OF_CUDA_12_8: Final = 100
_FIRST_WITH_BFLOAT16: Final = 80
#: Functions that a program runs while it ends; an error in one is not the reason for its end.
_CLEANS_UP: Final = (
    "_loop_finally", "release", "__del__", "shutdown", "_exit_function", "atexit", "terminate",
    "__exit__", "_cleanup", "cleanup",
)  # fmt: skip
_THREADS: Final = "https://github.com/InternLM/lmdeploy/issues"
#: The first release of LMDeploy whose TurboMind repeats KV heads over more ranks.
#: Source: presets/engines/generations.yaml.
_REPEATS_KV_HEADS: Final = "0.6.5"
#: The beginning of an answer to a log that was cut inside a traceback.
_CUT: Final = "the log breaks off inside a traceback, before the line that names the error"
#: What an engine does when it stands still, with words of the last line that it prints before.
_STANDS: Final = {
    "TurboMind's cache or warm-up": re.compile(
        r"Object cache budget|slab_size|\[Gemm2\]|Warm-up lengths|UnifiedAttentionLayer::Forward"
    ),
    "NCCL's first collective": re.compile(r"NCCL INFO (?:comm |Channel|Connected|.*Init COMPLETE)"),
}


def figures_of(case: LogCase, mark: LogEvent, hit: Hit) -> dict[str, Any]:
    """Return by name the values that a row's sentences and condition may use; None if unknown.

    The values are the log's options and facts, and the groups of the row's pattern, numbers as
    integers. Further values follow from them: a group NAME_bytes also gives NAME, in units.
    """
    texts = {**case.subject.options, **case.subject.facts, **hit.fields, "said": hit.said}
    of_log = {
        name: int(text) if isinstance(text, str) and text.isdecimal() else text
        for name, text in texts.items()
    }
    sizes = {
        name.removesuffix("_bytes"): format_bytes(int(text))
        for name, text in hit.fields.items()
        if name.endswith("_bytes")
    }
    means, step = table().responses.get(str(of_log.get("response")), (None, None))
    of_line = {
        "response_means": means,
        "response_step": step,
        "source_line": (mark.stack[-1].code if mark.stack else "") or None,
    }
    packages = {
        f"{name}_release": case.subject.packages.get(name)
        for name in ("lmdeploy", "torch", "triton")
    }
    cards, releases = _of_cards(case, of_log), _of_releases(case, mark, of_log)
    return of_log | sizes | of_line | packages | cards | releases | _of_heads(case, of_log)


def _of_cards(case: LogCase, of_log: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name values about the cards, from the log or else from the machine.

    ``of_log``: the values that the log gives. ``arch`` is 86 for the compute capability 8.6.
    """
    model, gpu, visible = case.model, case.gpu, case.subject.visible
    figures: dict[str, Any] = {
        "linear_on_h20": of_log.get("linear") if gpu and "H20" in gpu.name else None,
        "visible": visible,
        # True if several cards are visible, and no option gives the degree.
        "unused_gpus": ("tp" not in case.subject.options and (visible or 1) > 1) or None,
        "fits_one": None,
        "fits_none": None,
    }
    if model is not None and gpu is not None:
        fits_one = model.weight_bytes < gpu.usable
        figures["fits_one" if fits_one else "fits_none"] = (
            f"{model.name} is {format_bytes(model.weight_bytes)} of weights, and"
            f" {'one' if fits_one else 'each'} of the cards has {format_bytes(gpu.usable)}"
        )
    return figures | _of_capability(case, of_log)


def _of_capability(case: LogCase, of_log: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name values about the compute capability of the cards, and of what was built."""
    arch, gpu = of_log.get("arch"), case.gpu
    if arch is None and gpu and gpu.compute_capability != NA:
        arch = gpu.compute_capability[0] * 10 + gpu.compute_capability[1]
    built = list(map(int, re.findall(r"(?:sm|compute)_(\d+)", str(of_log.get("built") or ""))))
    newest, oldest = max(built, default=None), min(built, default=None)
    told: dict[str, Any] = {
        "arch": arch, "built_newest": newest, "built_oldest": oldest,
        "no_bfloat16": None, "too_new": None, "too_old": None, "other_arch": None,
        **_possible_cards(arch),
    }  # fmt: skip
    if case.subject.of_lmdeploy and case.too_old:
        told["too_old"] = case.no_machine  # for no engine of LMDeploy is there a build
    if arch is None:
        return told
    if arch < _FIRST_WITH_BFLOAT16:
        told["no_bfloat16"] = arch
    # Newer than the build that the log names, or than every build up to CUDA 12.6.
    if arch > (newest or _FIRST_OF_CUDA_12_8 - 1):
        told["too_new"] = True
    if oldest is not None and arch < oldest:
        told["too_old"] = True
    # The card is not of the compute capability that a kernel's own check names.
    if arch // 10 != of_log.get("wanted_arch", 0):
        told["other_arch"] = arch
    return told


def _possible_cards(arch: int | None) -> dict[str, str | None]:
    """Return examples of new and of old cards; None of a kind that the log's card is not of."""
    may_be_new = arch is None or arch >= _FIRST_OF_CUDA_12_8
    may_be_old = arch is None or arch < _FIRST_WITH_BFLOAT16
    return {
        "newer_cards": "RTX 50, B200" if may_be_new else None,
        "before_ampere": "V100, T4, RTX 20" if may_be_old else None,
    }


def _of_heads(case: LogCase, of_log: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name values about a tp that the KV heads cannot be divided by.

    TurboMind before 0.6.5 does not repeat KV heads; its log alone has their number.
    ``unsure_tp``: the KV heads or the release are not known.
    """
    tp, version, model = case.shown_tp or 1, case.subject.version, case.model
    heads = of_log.get("kv_heads") or (model.text.kv_heads if model is not None else None)
    divided = gcd(heads or 1, tp)
    told = {"kv_heads": heads, "dividing_tp": divided, "unsure_tp": None, "undivided_tp": None}
    repeats = version is not None and written(version) >= written(_REPEATS_KV_HEADS)
    if divided == tp or repeats or case.subject.on_pytorch:
        return told
    sure = heads is not None and (version is not None or "kv_heads" in of_log)
    return told | {"undivided_tp" if sure else "unsure_tp": tp}


def _of_releases(case: LogCase, mark: LogEvent, of_log: Mapping[str, Any]) -> dict[str, Any]:
    """Return by name which releases of LMDeploy and Transformers know the names in a line.

    ``of_log``: the values that the log gives, such as the name of an option or an architecture.
    """
    option, value, version = of_log.get("option"), of_log.get("value"), case.subject.version
    # A usage error names an option, or an argument with the value that is refused.
    asked = option or (f"{of_log.get('argument')} {value}" if value else None)
    with_dashes = str(option or "").replace("_", "-")
    named = (of_log.get(field) for field in ("type", "name", "imported"))
    name = str(next(filter(None, named), ""))
    since = listed_since(of_log.get("architecture") or "")
    own = mark.stack and owner_of(mark.stack[-1].path) == "lmdeploy"
    return {
        "asked_option": asked,
        "option_since": option_since(tuple(str(asked or "").split())),
        "option_written": with_dashes
        if with_dashes != str(option or "") and option_since((with_dashes,))
        else None,
        "brought": release_of(name, dropped=False),
        "dropped": release_of(name, dropped=True),
        "listed_since": since,
        "too_old_for": version if since and version and written(version) < written(since) else None,
        "newer_lmdeploy": "a newer LMDeploy" if own else None,
        "turbomind_lists": _of_turbomind(case),
    }


def _of_turbomind(case: LogCase) -> str | None:
    """Return since which release TurboMind lists the log's model, in words; None if unknown.

    None also if TurboMind of the log's own release lists the architecture.
    """
    if (model := case.model) is None or model.text is None:
        return None
    if not_listed(model, "turbomind", REFERENCE):
        return f"no release up to {REFERENCE} has {model.architecture} in TurboMind's list"
    after = case.subject.version or "0.0.0"  # this is the time before the first list
    since = listed_since(model.architecture, after=after, engines=("turbomind",))
    lists = f"TurboMind has {model.architecture} in its list since {since}"
    return f"pip install -U lmdeploy, {since} or newer: {lists}" if since else None


def sentence(text: Sentence, known: Mapping[str, Any]) -> str:
    """Fill a sentence with known values.

    Of two forms the second is filled if a value of the first is unknown.
    """
    first, second = (text, text) if isinstance(text, str) else text
    form = second if any(known.get(name) is None for name in names_of(first)) else first
    shown = {name: "?" if known.get(name) is None else known[name] for name in names_of(form)}
    return without_keys(form.format(**shown)) if form else ""


def names_of(text: str) -> set[str]:
    """Return the names of the ``{fields}`` in a sentence."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def answer_to_line(mark: LogEvent, case: LogCase) -> Draft | None:
    """Return the answer to a line: by the first row of ``mark.hits`` whose condition holds.

    Without a row an error is an unknown fault. None if no row of a known message holds.
    """
    for hit in mark.hits:
        row, known = hit.row, figures_of(case, mark, hit)
        if not row.when or known.get(row.when) is not None:
            break
    else:
        return None if isinstance(mark.event, events.KnownMessage) else _unknown_fault(mark, case)

    def said(texts: Iterable[Sentence]) -> tuple[str, ...]:
        return tuple(filter(None, (sentence(text, known) for text in texts)))

    kind, what = table().kinds.get(row.kind, Kind()), sentence(row.what, known)
    return Draft(
        kind=row.kind,
        line=mark.line,
        phase=(row.phase or kind.phase) if what else "unknown",
        what=what,
        rank=row.rank,
        why=(*(said(row.why) if what else raised_in(mark)), *_threads(row)),
        possible=said(row.possible),
        changes=said(row.change),
        unknown=said(row.unknown),
        evidence=(evidence(mark, "the message"),),
        planned=kind.plan,
        by_row=not row.frame,
    )


def _threads(row: Row) -> tuple[str, ...]:
    """Return one sentence with LMDeploy's threads about a message; empty without a thread."""
    urls = [f"{_THREADS}/{number}" for number in re.findall(r"\blmdeploy#(\d+)", row.source)]
    return (text_of("threads").format(urls=", ".join(urls)),) if urls else ()


def possible_answers(case: LogCase) -> Iterator[Draft]:
    """Yield all possible answers to a run, in no particular order.

    `lack_of_memory` answers the first line in which CUDA or torch reports a lack of GPU memory.
    The answer to a kill by the kernel is made here, with the words of `death`. `answer_to_line`
    answers each other fatal line.
    """
    facts = case.facts
    if short := next((mark for mark in facts.fatal if mark.short), None):
        yield lack_of_memory(case, short)
    if kills := facts.every(events.HostKill):
        mark, kill = kills[0]
        end = death([kill])
        yield Draft(
            kind=IN_DIAGNOSIS["host_memory"],
            phase="host RAM",
            what=end.message,
            line=mark.line,
            held=(Holding(who=f"{kill.name}[{kill.pid}]", bytes=kill.rss, lines=(mark.line,)),),
            missing=Missing(bytes=None, basis="unknown", note="the kernel does not say how much"),
            evidence=(evidence(mark, "the kernel's killer and its victim"),),
            changes=(end.hint, text_of("grows")),
        )
    for mark in facts.fatal:
        counted = mark.short or isinstance(mark.event, events.HostKill)
        if not counted and (draft := answer_to_line(mark, case)):
            yield _with_chain(draft, mark, facts)
    over = (events.WarmupFinished, events.ServerUp, events.CudaError, events.CheckFailed)
    if facts.waiting and not any(isinstance(mark.event, over) for mark in facts.marks):
        yield _waits_for_ever(case, facts.waiting)
    elif not facts.died:
        yield from _stands_still(case)
    yield from _quiet(case)


def _unknown_fault(mark: LogEvent, case: LogCase) -> Draft:
    """Return the answer to an exception or a fault without a row.

    Four kinds of exceptions are consequences of another error: an exit, an exception in a clean-up,
    one that Python raised while it handled another, and Ray's copy of a worker's.
    """
    text = without_keys(mark.text.strip())
    if isinstance(mark.event, events.PythonError) and not mark.event.message and mark.stack:
        text = f"{text}: {without_keys(mark.stack[-1].code)}"
    cleans_up = any(frame.function in _CLEANS_UP for frame in mark.stack)
    why = (*raised_in(mark), *([text_of("cleans up")] if cleans_up else []))
    follows = mark.after or text.startswith("SystemExit") or cleans_up or mark.copied
    fault = whose_fault(mark, case) or WhoseFault("unknown")
    return Draft(
        kind=fault.kind,
        line=mark.line,
        rank="consequence" if follows else "refusal",
        what=fault.what,
        where=fault.where,
        possible=fault.possible,
        changes=fault.changes,
        why=why,
        evidence=(evidence(mark._replace(text=text), "the error itself"),),
        planned=isinstance(mark.event, events.CheckFailed),
    )


def _with_chain(draft: Draft, first: LogEvent, facts: LogFacts) -> Draft:
    """Add to an answer the exceptions that Python raised while it handled the answer's own."""
    lines, later = {first.line}, []
    for mark in facts.fatal:
        if mark.after in lines:
            lines.add(mark.line)
            later.append(evidence(mark, "raised while the first was handled"))
    followed = (f"while Python handled this error, {line.text} followed" for line in later)
    return replace(draft, why=(*draft.why, *followed), evidence=(*draft.evidence, *later))


def _waits_for_ever(case: LogCase, waiting: LogEvent) -> Draft:
    """Return the answer to a warm-up that waits for room in the cache until the log ends."""
    facts = case.facts
    # `death` takes a run for a hang if its last event is a wait for memory.
    run = [*(mark.event for mark in facts.marks), events.Backpressure(cause="memory")]
    end = death(run, known=(case.engine, case.settings))
    sizes: dict[type[Any], str] = {
        events.CacheBudget: "the cache's size", events.Slab: "the size of a block",
        events.WarmupLengths: "the lengths of the warm-up",
    }  # fmt: skip
    lines = [evidence(mark, tells) for kind, tells in sizes.items() if (mark := facts.first(kind))]
    missing = Missing(
        bytes=end.missing,
        basis="formula",
        note="of cache, for the blocks of one warm-up request",
        doubt=getattr(facts.first_event(events.Slab), "slab_size", 0),
    )
    return Draft(
        kind=IN_DIAGNOSIS["hang"],
        phase="start-up hang",
        what=end.message if end.missing else "",
        line=waiting.line,
        possible=(text_of("warm-up waits"),),
        why=(text_of("warm-up waits"),) if end.missing else (),
        missing=missing if end.missing else None,
        evidence=(evidence(waiting, "nothing can be admitted, to the log's end"), *lines),
        changes=(end.hint,),
        planned=True,
    )


def _stands_still(case: LogCase) -> Iterator[Draft]:
    """Yield an answer if the user or the last line shows that the engine stands still."""
    mark = case.facts.last or LogEvent(0, "")
    several = case.tp > 1 or (case.told_tp is None and case.machine is not None
                              and len(case.machine.gpus) > 1)  # fmt: skip
    steps = ("no p2p", "py-spy") if several or "NCCL" in mark.text else ("py-spy",)
    place = next((name for name, words in _STANDS.items() if words.search(mark.text)), "")
    ends = f"it ends in {place}" if place else "it ends at this line"
    if not case.hangs and (not place or _ready(case)):
        return
    yield Draft(
        kind=IN_DIAGNOSIS["stalled"],
        line=mark.line,
        rank="consequence",
        what=f"no line of this log tells of an error; {ends}, and if the engine stands still:",
        possible=(
            text_of("nccl waits" if several else "reads"),
            *([text_of("warm-up waits")] if "cache" in place else []),
        ),
        evidence=(evidence(mark, "the last news"),),
        changes=tuple(map(text_of, steps)),
    )


def _quiet(case: LogCase) -> Iterator[Draft]:
    """Yield the answers without a fault: a healthy start, an unclear error, no peer access."""
    ready, facts = _ready(case), case.facts
    if facts.cut:
        yield Draft(
            kind="unknown",
            line=facts.cut.line,
            rank="consequence",
            what=f"{_CUT}: {facts.cut.text.strip()}",
            unknown=("what caused it",),
            evidence=(evidence(facts.cut, "the last frame that the log has"),),
        )
    if ready:
        yield Draft(
            kind="healthy",
            phase="none",
            what="nothing failed in this log: the engine started (if it stands still: --hang)",
            line=ready.line,
            rank="notice",
            evidence=(evidence(ready, "the engine is ready"),),
        )
    elif facts.complaint and tells_of_memory(facts.complaint.text):
        yield lack_in_words(case, facts.complaint)
    elif facts.complaint:
        ends = [mark for mark in facts.fatal if not mark.is_notice]
        # The words before an exit, or before an abort of compiled code, are its reason.
        exits = any(mark.text.startswith("SystemExit") for mark in ends)
        exits |= {mark.kind for mark in ends} == {"aborted"} and facts.complaint.line < ends[0].line
        rank: Rank = "consequence" if facts.complaint.is_severe else "notice"
        yield Draft(
            kind="unknown",
            line=facts.complaint.line,
            rank="refusal" if exits else rank,
            evidence=(evidence(facts.complaint, "the last line that reports an error"),),
        )
    if peers := facts.first(events.PeerMissing):
        yield Draft(
            kind="peer_warning",
            phase="peer access",
            what="only a warning: these GPUs have no peer access to each other",
            line=peers.line,
            rank="notice",
            why=(text_of("no peers"),),
            evidence=(evidence(peers, "the warning of LMDeploy up to 0.7.3"),),
            planned=True,
        )


def _ready(case: LogCase) -> LogEvent | None:
    """Return the line that shows a ready engine.

    None if the run died, a later line reports an error, or the user says that the engine hangs.
    """
    facts = case.facts
    ups = (facts.first(kind) for kind in (events.ServerUp, events.WarmupFinished, events.Answered))
    served = (mark for mark, one in facts.every(events.ServerFigures) if one.succeeded)
    ready = next(filter(None, (*ups, *served)), None)
    last = max((mark.line for mark in (*facts.fatal, facts.complaint) if mark), default=0)
    healthy = ready is not None and not facts.died and last <= ready.line and not case.hangs
    return ready if healthy else None
