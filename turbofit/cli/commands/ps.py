"""``turbofit ps``: the servers of this user that run now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turbofit.cli.command import command
from turbofit.cli.options.common_options import FORMS
from turbofit.cli.terminal.output import Form

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from turbofit.report.painters.document import Block


@command(*FORMS, only_linux=True)
def ps(*, form: Form) -> int:
    from turbofit.launch.serve.runs import live_runs

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
        for one in live_runs()
    ]
    document = {"schema": "turbofit.ps/1", "servers": rows}
    form.show(document, lambda _: [_block(rows)])
    return 0


def _block(servers: Sequence[Mapping[str, Any]]) -> Block:
    from turbofit.report.painters.document import Paragraph, table

    if not servers:
        return Paragraph("no server of this user runs here")
    rows = (
        (
            one["run"],
            one["model"],
            one["state"] + (" (pretend)" if one["pretend"] else ""),
            str(one["pid"]),
            " ".join(one["urls"]),
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
