"""``turbofit doctor``: what would stop an engine here. ``diagnose``: why an engine ended."""

from __future__ import annotations

import os
import re
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options.common_options import FORMS, FULL, PORT, spec_option
from turbofit.cli.options.field_options import complete_model
from turbofit.cli.terminal.output import Form
from turbofit.core.errors import UsageError
from turbofit.core.process.network import DEFAULT_PORT

_NOT_KNOWN: Final = 3
#: One word that is a message of a log, not the name of a file: Killed, OutOfMemoryError.
_MESSAGE: Final = r"(?:\w+\.)*[A-Z][A-Za-z]*(?:ed|[Ee]rror|[Ee]xception)"

#: The bytes of a file's beginning that tell whether it is text.
_BEGINNING: Final = 4096
#: The bytes of a file that are searched for sentences, and how many sentences make an article.
_PROSE: Final = 1 << 18
_SENTENCES: Final = 3
_SENTENCE: Final = re.compile(r"[a-z]{2}[.?!](?=\s+[A-Z])")


@command(
    spec_option(),
    Option("--model", shell_complete=complete_model),
    Option("--port", type=PORT),
    FULL,
    *FORMS,
    only_linux=True,
)
def doctor(*, on: str | None, model: str | None, port: int | None, form: Form) -> int:
    """Examine the machine and show the findings.

    Exit 3 if something prevents serving, 4 if the machine cannot be read.
    """
    from turbofit.planning.checks import examine
    from turbofit.report.views.findings_view import doctor_view
    from turbofit.serving.runs import server_on

    served = None
    if model:
        from turbofit.model.source import resolve_model

        served = resolve_model(model)
    holder = server_on(port or DEFAULT_PORT)
    server = "" if holder is None else holder.name
    report = examine(on=on, model=served, port=port, server=server)
    # --full changes what the blocks contain, not which of them are shown.
    form._replace(full=True).show(report, partial(doctor_view, full=form.full or form.md))
    return report.exit_code


@command(
    Argument("log", metavar="LOG", type=PATH, required=False),
    Option("--model", shell_complete=complete_model),
    spec_option(),
    Option("--lmdeploy", metavar="VERSION"),
    Option("--hang", is_flag=True),
    *FORMS,
)
def diagnose(*, log: str | None, form: Form, **given: Any) -> int:
    """Read a log and show what ended the engine; exit 3 if the log proves no cause."""
    from turbofit.logs.explain import diagnose as explain
    from turbofit.logs.explain import refuse_prose
    from turbofit.report.views.findings_view import diagnosis_view

    if log is None and sys.stdin.isatty():
        raise UsageError("LOG is missing", hint="for example: turbofit diagnose server.log")
    log = log or "-"
    diagnosis = explain(_chunks(log), **given)
    if log != "-" and not os.path.exists(log):
        refuse_prose(log, diagnosis)
    elif diagnosis.kind == "unknown" and os.path.isfile(log):
        with open(log, "rb") as file:
            text = file.read(_PROSE).decode("utf-8", "replace")
        if len(_SENTENCE.findall(text)) >= _SENTENCES:
            refuse_prose(text, diagnosis)
    form.show(diagnosis, diagnosis_view)
    return 0 if diagnosis.known else _NOT_KNOWN


def _is_binary(beginning: bytes) -> bool:
    """Return whether a file's beginning is no text.

    Text in UTF-16 has null bytes, and a log that was cut while it was written begins with them.
    """
    return b"\0" in beginning.lstrip(b"\0") and beginning[:2] not in (BOM_UTF16_LE, BOM_UTF16_BE)


def _chunks(path: str) -> Iterator[bytes]:
    """Yield the lines of a log file, of stdin for ``-``, or a log that is given as text.

    ``path`` is such a text if no file has this name, and if it has several words, or is the name of
    an error.
    """
    try:
        if path == "-":
            yield from sys.stdin.buffer
            return
        with open(path, "rb") as file:
            if _is_binary(file.peek(_BEGINNING)[:_BEGINNING]):
                raise UsageError(
                    f"{path} is no log: its bytes are not text",
                    hint="name the file into which the program printed",
                )
            yield from file
    except OSError as exc:
        from turbofit.logs.explain import has_words

        if has_words(path) or re.fullmatch(_MESSAGE, path):
            yield path.encode()
            return
        raise UsageError(
            f"{path} cannot be read: {exc.strerror or exc}",
            hint="name a log file, - for stdin, or give the log itself in quotes",
        ) from None
