"""``turbofit quantize``: what a 4-bit checkpoint takes, the program that makes it, and its reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import FORMS, machine_options, model_argument
from turbofit.cli.terminal.output import Form, answer, say
from turbofit.core.errors import DoesNotFitError
from turbofit.core.process.progress import under_way

if TYPE_CHECKING:
    from turbofit.core.model import Model

_LEAST_TOKENS = 32


@command(
    *model_argument(),
    *machine_options(),
    Option("--samples", metavar="FILE|NAME"),
    Option("--calib-samples", metavar="N", type=click.IntRange(min=1)),
    Option("--calib-seqlen", metavar="TOKENS", type=click.IntRange(min=_LEAST_TOKENS)),
    Option("--out", metavar="FILE", type=PATH),
    *FORMS,
)
def quantize(
    *,
    model: str,
    revision: str | None,
    on: str | None,
    gpus: str | None,
    samples: str | None,
    calib_samples: int | None,
    calib_seqlen: int | None,
    out: str | None,
    form: Form,
) -> int:
    """Show what a quantisation takes, or write its program; exit 3 if the machine is too small."""
    from turbofit.core.process.files import write_output
    from turbofit.machine.source import machine_from
    from turbofit.model.quantize.fit import quantizing
    from turbofit.model.quantize.program import Request
    from turbofit.model.source import resolve_model
    from turbofit.report.views.quantize_view import quantizing_view

    machine = machine_from(on, gpus=gpus)
    with under_way("reading the checkpoint"):
        known = resolve_model(model, revision=revision)
    request = Request(
        name=_named(known, model),
        revision=known.revision,
        data=samples,
        samples=calib_samples,
        tokens=calib_seqlen,
    )
    made = quantizing(known, machine, request)
    code = 0 if made.fits else DoesNotFitError.exit_code
    if out == "-":
        answer(made.program)
        return code
    if out is not None:
        write_output(out, made.program)
        say(f"written to {out}: run it where llm-compressor is installed")
    form.show(made, quantizing_view)
    return code


def _named(model: Model, typed: str) -> str:
    """Return the checkpoint's folder, or its hub id, as Transformers takes it."""
    return model.source.where if model.source.kind == "folder" else model.hub_id or typed
