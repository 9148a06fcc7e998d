"""``turbofit ps``: the servers of this user that run now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turbofit.cli.command import command
from turbofit.cli.options.common_options import FORMS

if TYPE_CHECKING:
    from turbofit.launch.serve.runs import LiveRun
    from turbofit.report.painters.document import Block

__all__ = ["ps"]


@command(*FORMS, only_linux=True)
def ps(*, as_json: bool, md: bool) -> int:
    """List them."""
    from turbofit.cli.terminal.output import show_form
    from turbofit.launch.serve.runs import live_runs

    servers = live_runs()
    rows = [
        {
            "run": one.name,
            "folder": str(one.folder),
            "model": one.record.model,
            "state": one.state,
            "pid": one.record.pid,
            "started": one.record.started,
            "urls": one.record.urls,
            "pretend": one.record.pretend,
        }
        for one in servers
    ]
    document = {"schema": "turbofit.ps/1", "servers": rows}
    show_form(document, lambda _: [_block(servers)], as_json=as_json, md=md)
    return 0


def _block(servers: list[LiveRun]) -> Block:
    from turbofit.report.painters.document import Paragraph, table

    if not servers:
        return Paragraph(text="no server of this user runs here")
    rows = (
        (
            one.name,
            one.record.model,
            one.state + (" (pretend GPUs)" if one.record.pretend else ""),
            str(one.record.pid),
            " ".join(one.record.urls),
        )
        for one in servers
    )
    return table(
        ("run", "model", "state", "pid", "address"),
        rows,
        right=("pid",),
        wrap=("state", "address"),
        aside=("model",),  # most of it stands in the run's name
    )
