"""The views of what a quantisation takes, and of what its result is."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

from turbofit.core.messages import counted
from turbofit.core.struct import NA, Struct
from turbofit.core.units import format_bytes
from turbofit.report.painters.document import (
    Code,
    Heading,
    Items,
    Verdict,
    known_facts,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.plan import Plan
    from turbofit.model.quantize.fit import Quantizing
    from turbofit.model.quantize.read import Reading
    from turbofit.report.painters.document import Block

#: The name of the program in the commands that are shown, where no other was typed.
_PROGRAM: Final = "quantize.py"
#: What is said of LMDeploy's own class.
_EQUAL: Final = {
    None: "not asked: LMDeploy's TurboMind cannot be imported here",
    True: "makes the same weights of it, bit for bit",
    False: "makes other weights of it",
}


class Typed(Struct):
    """What was typed after `turbofit quantize`.

    ``start`` are the words of model and machine. ``samples`` and ``out`` are the options' values.
    """

    start: tuple[str, ...]
    samples: str | None = None
    out: str | None = None


def quantizing_view(made: Quantizing, typed: Typed) -> Iterator[Block]:
    """Yield what a quantisation takes of a machine, and the commands that make the checkpoint."""
    needs, scheme = made.needs, made.scheme
    left = "" if made.host_available == NA else f" of {format_bytes(made.host_available)}"
    yield Heading(f"{made.model} in 4 bits, made on {made.machine}", short=True)
    yield Verdict(made.verdict, "good" if made.fits else "bad", short=True)
    yield known_facts(
        {
            "card": f"{format_bytes(needs.card + made.context)} of {format_bytes(made.card_free)}:"
            f" {_terms(needs.card_terms)}, CUDA context {format_bytes(made.context)}",
            "host memory": f"{format_bytes(needs.host)}{left}: {_terms(needs.host_terms)}",
            "disk": f"{format_bytes(needs.disk)} for the result beside"
            f" {format_bytes(needs.source)} of the checkpoint",
            "packed": f"GPTQ, int4, symmetric, groups of {scheme.group_size}; TurboMind reads it",
            "in 16 bits": ", ".join(scheme.ignore),
            "smallest card": made.smallest_card or "none that turbofit knows",
            "lmdeploy lite auto_awq": _auto_awq(made),
        },
        short=True,
    )
    yield Heading("How", short=True)
    yield Code(made.install, "the packages", short=True)
    yield Code(_making(made, typed), "the program", short=True)
    if made.warnings:
        yield Items(made.warnings, "warn", short=True)


def _terms(terms: dict[str, int]) -> str:
    """Return the terms that are not 0, the largest first."""
    largest = sorted(terms.items(), key=lambda term: -term[1])
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in largest if size)


def _auto_awq(made: Quantizing) -> str:
    """Return what LMDeploy's own tool takes of the card, and whether it fits."""
    needs = made.auto_awq
    if needs.why_not:
        return needs.why_not
    does = "fits" if needs.card + made.context <= made.card_free else "does not fit"
    usual = f"its usual {counted(needs.samples, 'sample')} of {needs.tokens:,} tokens"
    return f"makes AWQ; {format_bytes(needs.card)} of the card, which {does}, for {usual} at once"


def _making(made: Quantizing, typed: Typed) -> str:
    """Return the commands that write the program, run it, and examine its result.

    The numbers of samples and tokens are those that were counted.
    """
    start, program = ["turbofit", "quantize", *typed.start], typed.out or _PROGRAM
    data = [] if typed.samples is None else ["--samples", typed.samples]
    counts = ["--calib-samples", str(made.needs.samples), "--calib-seqlen", str(made.needs.tokens)]
    variables = [f"{name}={value}" for name, value in made.environment.items()]
    commands = (
        [*start, *data, *counts, "--out", program],
        [*variables, "python", program],
        [*start, "--read", made.folder],
    )
    return "\n".join(map(shlex.join, commands))


def reading_view(reading: Reading, plan: Plan | None) -> Iterator[Block]:
    """Yield what was found in a checkpoint of 4 bits, and its plan, if there is one."""
    from turbofit.report.views.plan_view import plan_view

    yield Heading(reading.folder, short=True)
    yield Verdict(_found(reading), "good" if reading.good else "bad", short=True)
    yield known_facts(
        {
            "packed": f"{reading.packed:,} weights in groups of {reading.group_size}",
            "LMDeploy's class": _EQUAL[reading.equal],
            "beside 16 bits": _beside(reading),
            **{name: why or "reads it" for name, why in reading.engines.items()},
        },
        short=True,
    )
    if reading.problems:
        yield Items(reading.problems, "bad", short=True)
    titles = ("layers", "count", "bits", "size")
    rows = (
        (one.name, f"{one.count:,}", "4" if one.packed else "16", format_bytes(one.bytes))
        for one in reading.layers
    )
    yield table(titles, rows, right=("count", "bits", "size"))
    if plan is not None:
        yield from plan_view(plan)


def _found(reading: Reading) -> str:
    if reading.problems:
        count = len(reading.problems)
        return f"LMDeploy would not serve it as it is: {counted(count, 'problem')}"
    engines = [name for name, why in reading.engines.items() if not why]
    return f"it is what LMDeploy reads ({' and '.join(engines)})"


def _beside(reading: Reading) -> str:
    if not reading.compared:
        return "the 16-bit weights are not on this disk, so nothing was compared with them"
    return f"no weight of a tensor is further off than {reading.worst_error:.3f} of its norm"
