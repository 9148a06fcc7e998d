"""``turbofit doctor --kernels``: which kernels TurboMind holds for the cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.core.errors import PackageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from turbofit.core.machine import Gpu
    from turbofit.kernels.census import Census
    from turbofit.report.painters.document import Block

__all__ = ["show_kernels"]


def show_kernels(on: str | None, *, as_json: bool, md: bool) -> int:
    """Show the census of the installed engine, and of the reference where none is installed.

    Raises:
        UsageError: ``on`` cannot be meant.
        MachineError: this machine cannot be read.
        PackageError: the census cannot be read.
    """
    from turbofit.cli.terminal.output import answer, show
    from turbofit.core.struct import to_json
    from turbofit.kernels.installed import installed
    from turbofit.kernels.released import released
    from turbofit.machine.source import machine_from
    from turbofit.memory import versions

    reference = versions.parse(versions.REFERENCE)
    census, source = installed(), "the installed engine"
    if census is None and reference is not None:
        census, source = released(reference), f"the wheel of LMDeploy {versions.REFERENCE}"
    if census is None:
        raise PackageError("the kernels cannot be read", hint="reinstall turbofit")
    if as_json:
        answer(to_json(census))
        return 0
    machine = machine_from(on)
    gpus = [machine.gpu(index) for index in machine.visible]
    show(list(_view(census, source, gpus)), markdown=md)
    return 0


def _view(census: Census, source: str, gpus: Sequence[Gpu]) -> Iterator[Block]:
    """A row for each family, a column for each kind of card: kernels with code, empty ones."""
    from turbofit.report.painters.document import Heading, Paragraph, table

    yield Heading(text=f"Kernels of TurboMind ({source})")
    cards = {gpu.name: gpu.compute_capability for gpu in gpus}
    found: list[tuple[str, str]] = []
    for name, capability in cards.items():
        architecture = None if capability == "NA" else census.architecture(capability)
        if architecture is None:
            yield Paragraph(text=f"{name}: no code", tone="bad")
        else:
            found.append((name, architecture))
    if not found:
        yield Paragraph(text=f"there is code for {census.architecture_names()}")
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
