"""A command's run on pretend GPUs: how it ended, cards, processes; and the table of `--watch`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from turbofit.core.json_types import Document
from turbofit.core.units import format_bytes, mib
from turbofit.report.painters.document import (
    Block,
    FactList,
    Heading,
    Items,
    Paragraph,
    Table,
    table,
)


def pretend_view(document: Document) -> Iterator[Block]:
    """The document of `pretend.report`, for people."""
    yield Heading(f"PRETEND GPUs: {' '.join(document['command'])}")
    yield from _end(document)
    yield Heading("Cards at the peak of all processes together (MiB)")
    sizes = ("total", "used_by_others", "peak", "left_at_peak")
    yield _table(
        ("GPU", "name", "total", "others", "peak", "left"),
        (
            (str(gpu["gpu"]), gpu["name"], *(mib(gpu[size]) for size in sizes))
            for gpu in document["gpus"]
        ),
    )
    if document["processes"]:
        yield Heading("Processes (MiB)")
        yield from _processes(document["processes"])
    if document["pinned_peak"]:
        pinned = format_bytes(document["pinned_peak"])
        yield Paragraph(f"page-locked host memory: at most {pinned}")
    yield Paragraph(f"{document['pretend']}; what each card held is", tone="dim")


def _end(document: Mapping[str, Any]) -> Iterator[Block]:
    code, seconds = document["exit_code"], document["seconds"]
    if document["signal"]:
        yield Paragraph(f"killed by {document['signal']} after {seconds:.1f} s", tone="bad")
    elif code:
        yield Paragraph(f"ended with exit code {code} after {seconds:.1f} s", tone="bad")
    else:
        yield Paragraph(f"ended well after {seconds:.1f} s", tone="good")
    refused = document["refused"]
    if refused is None:
        return
    failed = bool(code or document["signal"])
    times = f"; {refused['count']} were refused in all" if refused["count"] > 1 else ""
    lacked = f"{format_bytes(refused['short'])} short"
    if refused["simulated"]:
        lacked = f"simulated, allocation {refused['simulated']} was to fail"
    yield Paragraph(
        f"last refused: {format_bytes(refused['asked'])} ({refused['kind']}) on GPU "
        f"{refused['gpu']}, where {format_bytes(refused['left'])} were free: {lacked}{times}",
        tone="bad" if failed else "warn",
    )
    facts = [("by", f"{refused['pid']} {refused['command']}"), ("phase", refused["phase"])]
    yield FactList((*facts, ("where", refused["site"] or "not known")))


def _processes(processes: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    rows, sites = [], []
    for process in processes:
        for gpu in process["gpus"]:
            rows.append(
                (
                    str(process["pid"]),
                    str(gpu["gpu"]),
                    *(mib(gpu[k]) for k in ("context", "peak", "held_at_end", "at_combined_peak")),
                    gpu["phase"],
                )
            )
            if gpu["site"]:
                sites.append(f"{process['pid']} on GPU {gpu['gpu']}: {gpu['site']}")
    yield _table(("pid", "GPU", "context", "peak", "at end", "of the cards' peak", "phase"), rows)
    yield Items(tuple(f"{p['pid']}: {p['command']}" for p in processes), tone="dim")
    for process in processes:
        if not process["complete"]:
            text = (
                f"{process['pid']}: its timeline is full; phases and calls after that are missing"
            )
            yield Paragraph(text, tone="warn")
    if sites:
        yield Heading("Where the peaks came from")
        yield Items(tuple(sites))
    phases = [row for process in processes for row in _phases(process)]
    if phases:
        yield Heading("Most held by phase (MiB)")
        yield _table(("pid", "GPU", "phase", "peak"), phases)


def _phases(process: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for gpu in process["gpus"]:
        if len(gpu["phases"]) > 1:
            for phase, size in gpu["phases"].items():
                yield str(process["pid"]), str(gpu["gpu"]), phase, mib(size)


def watch_view(
    cards: Iterable[tuple[str, int, int, Sequence[tuple[int, int, str]]]],
) -> Iterator[Block]:
    """The table of `--watch`: for each card name, total, free, and (pid, size, command); bytes."""
    rows: list[tuple[str, ...]] = []
    for index, (name, total, free, holders) in enumerate(cards):
        rows.append((str(index), name, mib(total - free), mib(free), ""))
        rows += [("", "", mib(size), "", f"{pid} {holder}") for pid, size, holder in holders]
    yield Heading("PRETEND GPUs (MiB)")
    yield _table(("GPU", "name", "used", "free", "process"), rows)


def _table(titles: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Table:
    numbers = [title for title in titles if title not in ("name", "phase", "process")]
    return table(titles, rows, right=numbers, wrap=("process", "phase"))
