"""Puts the steps of an answer in order, without steps that contradict the plan or the log."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from turbofit.core.errors import option_of
from turbofit.logs.causes import text_of
from turbofit.logs.log_events import LegacyCuda

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.logs.answer import Advice, Draft
    from turbofit.logs.case import LogCase
    from turbofit.logs.next_run import NextRun

#: All settings on which a plan's memory depends.
_TOGETHER: Final = ("engine", "tp", "cache_max_entry_count", "max_prefill_token_num",
                    "max_batch_size", "session_len", "max_dynamic_patch",
                    "max_pixels_per_image")  # fmt: skip
#: Options of these settings whose names differ from the settings' names.
_OPTIONS: Final = {"engine": "--backend", "max_pixels_per_image": "--max-pixels"}
#: A variable with a value in a step.
_VARIABLE: Final = re.compile(r"\b([A-Z][A-Z0-9_]+)=(\S+?)[:;,]?(?=\s|$)")
_SHARE: Final = re.compile(r"cache[-_]max[-_]entry[-_]count")
_OF_IMAGES: Final = ("fewer image tiles", "smaller images")


def steps_of(
    case: LogCase, draft: Draft, worked: Advice | None, following: NextRun
) -> tuple[str, ...]:
    """Return the steps in their order, without steps that contradict the plan or the log.

    The step that frees the cards is first. Changes that fit by the account (`_own`) come before the
    advice of a row (`_general`), and replace it where they cure LMDeploy's lack of memory. If only
    the log gives the next share of the cache, advice comes first. A change of the cache's ratio is
    left out if no ratio helps.
    """
    own, general = _own(case, draft, worked, following), [*_general(case, draft, worked, following)]
    if draft.emptied and own:
        steps = [*own, *general]
    elif _by_log(worked, following):
        steps = [*general, *own]
    elif draft.short and worked is not None:
        enough = own and case.subject.of_lmdeploy and not draft.unsized
        steps = own if enough else [*own, *general]
    elif following.ways or (draft.changes and not general):
        steps = own
    else:
        steps = general
    free = draft.free
    if draft.emptied and free and own:
        free, steps = f"{free}; then {own[0]}", steps[1:]
    return tuple(filter(None, dict.fromkeys((free, *steps))))


def _by_log(worked: Advice | None, following: NextRun) -> bool:
    """Return whether the log alone gives the next share of the cache, without a plan."""
    planned = worked is not None and worked.fits is not None
    return following.share is not None and following.fits is None and not planned


def _general(
    case: LogCase, draft: Draft, worked: Advice | None, following: NextRun
) -> Iterator[str]:
    """Yield general advice; with the number of the next share if the log alone gives the share."""
    share = any(_SHARE.search(remedy.change) for remedy, _ in following.ways)
    tiny = case.tiny_share and not draft.unsized
    no_share = draft.short and (following.fits is not None or tiny or draft.contradicts)
    vain = (no_share and not share) or (worked is not None and worked.fits is False)
    numbered = _in_words(case, following.share) if _by_log(worked, following) else ""
    # Cards that are visible, and that the run did not use, help in any phase.
    yield from (step for step in draft.changes if step.startswith("--tp "))
    if numbered and draft.short:
        yield numbered
    for step in draft.changes:
        if not _idle(case, step, vain=vain):
            yield numbered if numbered and _SHARE.search(step) else step


def _own(case: LogCase, draft: Draft, worked: Advice | None, following: NextRun) -> list[str]:
    """Return the changes of settings with which the model fits, according to the account.

    If the account says that the run that died fits too, a note in the first change says this.
    """
    if worked and worked.in_place_of:
        return [f"{worked.model} in place of {worked.in_place_of}, which does not fit"]
    own = [remedy.change for remedy in worked.remedies] if worked else []
    if own and following.too_small:
        own[0] += " (no lower --cache-max-entry-count starts)"
    if not draft.short or draft.emptied:
        return own
    if following.fits:
        then = own[0] if own else text_of("less memory")
        doubted = f"{then}: the run fits by the account, so the account is too low here"
        return [doubted if draft.all_own else f"{text_of('look first')}; then {then}", *own[1:]]
    if worked and worked.settings and not following.ways:
        return [_together(worked)] if case.subject.of_lmdeploy and worked.fits else []
    return own


def _in_words(case: LogCase, share: float | None) -> str:
    """Return the step to a lower share of the cache, with the share that ran out of memory."""
    # TurboMind of LMDeploy 0.2.0 and 0.2.1 had 0.5: presets/engines/generations.yaml.
    old = case.assumption and case.facts.first(LegacyCuda)
    default = f", the default{' since 0.2.2' if old else ''},"
    given = "" if "cache_max_entry_count" in case.subject.options else default
    return f"--cache-max-entry-count {share:g}: with {case.ratio:g}{given} it ran out of memory"


def _together(worked: Advice) -> str:
    """Return one step with all settings on which a plan depends, the engine and limits included."""
    names = [name for name in _TOGETHER if worked.settings.get(name) is not None]
    options = (f"{_OPTIONS.get(name, option_of(name))} {worked.settings[name]}" for name in names)
    return f"these settings together: {' '.join(options)}"


def _idle(case: LogCase, step: str, *, vain: bool) -> bool:
    """Return whether a step cannot help.

    A step that sets a variable cannot help if the run had set it so. A step that changes images
    cannot help a model that reads text alone. If ``vain``, a step that changes the cache ratio
    cannot help either.
    """
    variables = case.subject.variables
    done = any(variables.get(name) == value for name, value in _VARIABLE.findall(step))
    of_images = case.reads_text_alone and step.startswith(_OF_IMAGES)
    return done or of_images or (vain and _SHARE.search(step) is not None)
