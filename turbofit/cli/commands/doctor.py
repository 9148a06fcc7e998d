"""``turbofit doctor``: what on this machine would stop an engine, each with a fix."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from turbofit.cli.command import Option, command
from turbofit.cli.commands.completion import complete_model
from turbofit.cli.options.common_options import FORMS, FULL, PORT, spec_option
from turbofit.cli.terminal.output import Form
from turbofit.core.errors import PackageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from turbofit.core.machine import Machine
    from turbofit.kernels.census import Census
    from turbofit.planning.checks import DoctorReport
    from turbofit.planning.examine.scene import State
    from turbofit.report.painters.document import Block, Tone

_ORDER: Final[tuple[State, ...]] = ("stops", "warning", "unreadable", "ok")
#: What is said behind a number, behind one and behind more.
_COUNTED: Final[dict[State, tuple[str, str]]] = {
    "stops": ("stops serving", "stop serving"),
    "warning": ("warning", "warnings"),
    "unreadable": ("could not be read", "could not be read"),
    "ok": ("in order", "in order"),
}
_TITLES: Final[dict[State, str]] = {
    "stops": "Stops serving",
    "warning": "Warnings",
    "unreadable": "Could not be read",
    "ok": "In order",
}


@command(
    spec_option(),
    Option("--model", shell_complete=complete_model),
    Option("--port", type=PORT),
    Option("--kernels", is_flag=True),
    FULL,
    *FORMS,
    only_linux=True,
)
def doctor(
    *,
    on: str | None,
    model: str | None,
    port: int | None,
    kernels: bool,
    form: Form,
) -> int:
    """Examine and show; exit 3 where something stops serving, 4 without a readable machine."""
    from turbofit.planning.checks import examine

    if kernels:
        return show_kernels(on, form)
    served = None
    if model:
        from turbofit.model.source import resolve_model

        served = resolve_model(model)
    report = examine(on=on, model=served, port=port)
    form._replace(full=True).show(report, partial(_view, full=form.full or form.md))
    return report.exit_code


def _view(report: DoctorReport, *, full: bool) -> Iterator[Block]:
    """What stops first; what is in order last, in a line where ``full`` is not asked for."""
    from turbofit.report.painters.document import Heading, Paragraph, known_facts, table

    counted = {state: report.count(state) for state in _ORDER}
    counts = ", ".join(f"{n} {_COUNTED[state][n > 1]}" for state, n in counted.items() if n)
    known = f"{report.machine} ({report.source})"
    yield Heading(known if report.machine else "no GPU that can be read")
    tone: Tone = "bad" if report.exit_code else "warn" if report.count("warning") else "good"
    yield Paragraph(counts, tone=tone)
    for state in _ORDER:
        found = [one for one in report.findings if one.state == state]
        if not found:
            continue
        if state == "ok" and not full:
            yield Heading(f"{_TITLES[state]} (--full shows what was seen)")
            yield Paragraph(", ".join(one.check for one in found))
            continue
        yield Heading(_TITLES[state])
        if state == "ok":
            yield table(("check", "seen"), ((one.check, one.seen) for one in found), wrap=("seen",))
            continue
        for one in found:
            yield Paragraph(f"{one.check}: {one.seen}", tone="bad" if state == "stops" else "warn")
            yield known_facts({"why": one.why, "fix": one.fix})


# Which kernels TurboMind holds for the cards.


def show_kernels(on: str | None, form: Form) -> int:
    """Show the census of the installed engine, and of the reference where none is installed.

    Raises:
        UsageError: ``on`` cannot be meant.
        MachineError: this machine cannot be read.
        PackageError: the census cannot be read.
    """
    from turbofit.core.version import REFERENCE
    from turbofit.kernels.installed import installed
    from turbofit.kernels.released import released
    from turbofit.machine.source import machine_from
    from turbofit.memory import versions

    reference = versions.parse(REFERENCE)
    census, source = installed(), "the installed engine"
    if census is None and reference is not None:
        census, source = released(reference), f"the wheel of LMDeploy {REFERENCE}"
    if census is None:
        raise PackageError("the kernels cannot be read", hint="reinstall turbofit")
    form._replace(full=True).show(
        census, lambda seen: _kernels_view(seen, source, machine_from(on))
    )
    return 0


def _kernels_view(census: Census, source: str, machine: Machine) -> Iterator[Block]:
    """A row for each family, a column for each kind of card: kernels with code, empty ones."""
    from turbofit.report.painters.document import Heading, Paragraph, table

    yield Heading(f"Kernels of TurboMind ({source})")
    gpus = [machine.gpu(index) for index in machine.visible]
    cards = {gpu.name: gpu.compute_capability for gpu in gpus}
    found: list[tuple[str, str]] = []
    for name, capability in cards.items():
        architecture = None if capability == "NA" else census.architecture(capability)
        if architecture is None:
            yield Paragraph(f"{name}: no code", tone="bad")
        else:
            found.append((name, architecture))
    if not found:
        yield Paragraph(f"there is code for {census.architecture_names()}")
        return
    titles = ("family", *(f"{name} (sm_{one})" for name, one in found))
    rows = (
        (family, *(_cell(census, family, architecture) for _, architecture in found))
        for family in sorted(census.families)
    )
    yield table(titles, rows)


def _cell(census: Census, family: str, architecture: str) -> str:
    count = census.count([family], architecture)
    if count.code:
        return str(count.code)
    return f"{count.empty} empty" if count.empty else "none"
