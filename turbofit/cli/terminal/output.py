"""Writes the answer to standard output, and everything else to standard error."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Final, NamedTuple, TextIO, TypeVar

import click
from click.core import ParameterSource

from turbofit.cli.terminal import screen
from turbofit.cli.terminal.screen import TERMINAL, ProgressDisplay
from turbofit.cli.words import TYPED
from turbofit.core.errors import UsageError
from turbofit.core.process.interpreter import stdout
from turbofit.core.process.network import EVERY_ADDRESS
from turbofit.core.process.progress import listened
from turbofit.core.struct import to_json

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from turbofit.core.process.signals import StopSignal
    from turbofit.core.struct import Document
    from turbofit.report.painters.document import Block
    from turbofit.serving.options import ServeConfig

T = TypeVar("T")

INTERRUPTED: Final = 130
#: Columns of a help page.
PAGE_WIDTH: Final = 96
#: The last line of a start by a command line of LMDeploy's server that names no address.
HERE_ONLY: Final = (
    "ready, on this machine only: LMDeploy would listen on every address (--server-name 0.0.0.0)"
)


def run_until_signal(body: Callable[[StopSignal], T]) -> T | signal.Signals:
    """Call ``body`` and return its result, or return the signal that stops ``body``."""
    from turbofit.core.process.signals import StoppedError, StopSignal

    with StopSignal() as stop:
        try:
            return body(stop)
        except StoppedError as exc:
            return exc.signal


def exit_code(ended: signal.Signals | None) -> int:
    """Return 130 after Ctrl-C, else 0, since every other signal stops a server normally."""
    return INTERRUPTED if ended is not None and ended.name == "SIGINT" else 0


def prepare_streams() -> None:
    """Let stdout and stderr escape characters that they cannot encode, instead of failing.

    On Windows both streams write UTF-8, since programs expect JSON in UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace", encoding="utf-8" if screen.WINDOWS else None)


class UnwrittenError(UsageError):
    """Standard output cannot be written; this error is printed on stderr, also with ``--json``."""


def answer(text: str) -> None:
    """Write the answer to stdout; a reader that has left is no error, but a full disk is.

    Raises:
        UnwrittenError: standard output cannot be written.
    """
    # Where a thread writes stderr, what was told before the answer is written before the answer.
    settle = getattr(sys.stderr, "settle", None)
    if settle is not None:
        settle()
    try:
        _write(stdout(), text)
    except OSError as exc:
        raise UnwrittenError(
            f"the answer cannot be written to stdout: {exc.strerror or exc}",
            hint="free space on that disk, or redirect stdout to another file",
        ) from exc


def note(text: str) -> None:
    """Write a line to stderr; errors are ignored."""
    with suppress(OSError):
        _write(sys.stderr, f"{text}\n")


def say(text: str) -> None:
    """Write a line of progress to stderr; with ``--quiet`` write only warnings."""
    if not _Progress.quiet or "warning: " in text:
        note(text)


class _Progress:
    """The state of progress in this process: ``quiet`` hides lines, ``display`` draws the step."""

    quiet = False
    display: ProgressDisplay | None = None


@contextmanager
def progress(*, quiet: bool, as_json: bool) -> Iterator[None]:
    """Show the steps of the block on stderr, unless ``quiet``.

    With ``as_json`` steps are shown only if stderr can redraw a line in its place. New lines would
    mix with the JSON for people who read both streams.
    """
    before = _Progress.quiet, _Progress.display
    display = None
    in_place = screen.redraws(sys.stderr)
    if sys.stderr is not None and not quiet and (in_place or not as_json):
        display = ProgressDisplay(sys.stderr, in_place=in_place)
    _Progress.quiet, _Progress.display = quiet, display
    try:
        with listened(display.hear) if display else nullcontext():
            yield
    finally:
        if display is not None:
            display.end()
        _Progress.quiet, _Progress.display = before


@contextmanager
def verbose_log(level: int) -> Iterator[None]:
    """Write turbofit's log to stderr.

    Level 0 writes nothing, level 1 records from INFO on, and level 2 records from DEBUG on.
    """
    if not level:
        yield
        return
    import logging

    from turbofit.report.painters.terminal import clean

    class StderrHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(clean(self.format(record)))

    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("turbofit")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if level == 1 else logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def complain(document: Document, *, as_json: bool) -> None:
    """Print an error: its cause and hint on stderr, or as JSON on stdout if ``as_json``.

    If stdout cannot be written, the error goes to stderr.
    """
    if as_json:
        import json

        with suppress(UnwrittenError):
            answer(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
            return
    from turbofit.report.painters.terminal import clean

    error = document["error"]
    note(f"error: {clean(error['message'])}")
    note(f"hint: {clean(error['hint'])}")


def show(blocks: Iterable[Block], *, markdown: bool = False, short: bool = False) -> None:
    """Print a document on stdout: as complete Markdown, or as text, which may be ``short``."""
    if markdown:
        from turbofit.report.painters import markdown as painter

        answer(painter.paint(blocks))
    else:
        answer(painted(blocks, short=short))


class Form(NamedTuple):
    """The form of the answer: JSON, Markdown, a page in a file, or text, which may be short."""

    as_json: bool = False
    md: bool = False
    full: bool = True
    html: str | None = None

    def tell(self, document: object, text: str) -> None:
        """Answer with the document if JSON is chosen, else with the text."""
        answer(to_json(document) if self.as_json else text)

    def show(self, document: T, view: Callable[[T], Iterable[Block]]) -> None:
        """Answer with a document in this form; ``view`` makes the blocks to paint."""
        if self.html:
            from turbofit.core.process.files import write_output
            from turbofit.report.painters.html import page

            text = page([*view(document)], document)
            if self.html != "-":
                write_output(self.html, text)
                text = f"{self.html}\n"
            answer(text)
        elif self.as_json:
            answer(to_json(document))
        else:
            show(view(document), markdown=self.md, short=not self.full)


def painted(blocks: Iterable[Block], *, short: bool = False) -> str:
    """Return a document as text; on a terminal in the terminal's width, from 40 to 120 columns."""
    from turbofit.report.painters.terminal import paint

    if not screen.is_terminal(stdout()):
        return paint(blocks, short=short)
    columns = min(max(screen.width(), 40), 120)
    return paint(blocks, width=columns, colour=screen.takes_colour(os.environ), short=short)


def _write(stream: TextIO | None, text: str) -> None:
    """Write a text after the progress line is erased; a reader that has left is no error."""
    if stream is None:  # the stream was closed before Python began
        return
    try:
        with TERMINAL:
            if _Progress.display is not None:
                _Progress.display.hide()
            stream.write(text)
            stream.flush()
    except OSError as exc:
        # At exit the interpreter writes the rest of the stream, and would fail again: let this go
        # to the null device.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        if not isinstance(exc, BrokenPipeError):
            raise


def say_cut(cut: int) -> None:
    """Print a server's last line: the number of requests that the server's end has cut off."""
    requests = "1 open request was" if cut == 1 else f"{cut:,} open requests were"
    say(f"ended: {requests} cut off")


def say_open(urls: Sequence[str], config: ServeConfig, model: str, form: Form) -> None:
    """Print a server's addresses, and how a client asks the server."""
    if form.as_json:
        return
    answer("".join(f"{url}\n" for url in urls))
    gateway = config.gateway
    if gateway is not None and gateway.front_keys and not gateway.api_key:
        return  # this is a node, and its front prints the lines
    key = bool(config.api_key) if gateway is None else bool(gateway.api_key)
    asked = f"{urls[0]}/v1, model {model}{', with a key' if key else ''}"
    say(f"to ask: turbofit chat {urls[0]}, or OpenAI's API at {asked}")
    page = "" if gateway is None else ", which is a page to chat in a browser"
    everywhere = ""
    if gateway is not None and gateway.host in EVERY_ADDRESS:
        everywhere = " and at every other address of this machine"
    say(f"ready at {urls[0]}{everywhere}{page}")
    say_here_only()


def say_here_only() -> None:
    """Say that only this machine is served, where LMDeploy would have served other machines.

    That is so for a command line of LMDeploy's server that names no address.
    """
    ctx = click.get_current_context(silent=True)  # no context if a program calls this function
    if (
        ctx is not None
        and ctx.get_parameter_source("host") is ParameterSource.DEFAULT
        and ctx.meta[TYPED].in_place
    ):
        say(HERE_ONLY)
