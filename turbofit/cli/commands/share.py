"""``turbofit share [RUN]``: a run on real cards beside its forecast, without names, for others."""

from __future__ import annotations

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import FORMS, RUN
from turbofit.cli.terminal.output import Form, note


@command(
    RUN,
    Option("--load", "loads", multiple=True, metavar="FILE", type=PATH),
    Option("--out", metavar="FILE", type=PATH),
    *FORMS,
)
def share(*, run: str | None, loads: tuple[str, ...], out: str | None, form: Form) -> int:
    """Show what is in the document and what is left out, then write it."""
    import msgspec

    from turbofit.core.process.files import write_output
    from turbofit.report.share import share_view, shared
    from turbofit.report.stored_documents import read_run

    document = shared(read_run(run), loads)
    form.show(document, share_view)
    if out is not None:
        # An issue takes 65,536 characters: indented, eight cards are more.
        write_output(out, msgspec.json.encode(document).decode() + "\n")
        note(f"{out} is written: look through it, then paste it into an issue, My card")
    return 0
