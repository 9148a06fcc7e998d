"""``turbofit quantize``: what a 4-bit checkpoint takes, its program, and whether it is read."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final

import click

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import FORMS, FULL, machine_options, model_argument
from turbofit.cli.terminal.output import Form, answer, say
from turbofit.core.errors import DoesNotFitError
from turbofit.core.messages import refuse_together
from turbofit.core.process.progress import under_way

if TYPE_CHECKING:
    from turbofit.core.machine import Machine
    from turbofit.core.model import Model

_LEAST_TOKENS: Final = 32


@command(
    *model_argument(),
    *machine_options(),
    Option("--samples", metavar="FILE|NAME"),
    Option("--calib-samples", metavar="N", type=click.IntRange(min=1)),
    Option("--calib-seqlen", metavar="TOKENS", type=click.IntRange(min=_LEAST_TOKENS)),
    Option("--out", metavar="FILE", type=PATH),
    Option("--read", metavar="OUT", type=PATH),
    FULL,
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
    read: str | None,
    form: Form,
) -> int:
    """Show what a quantisation takes, or write its program; exit 3 if the machine is too small."""
    from turbofit.core.process.files import write_output
    from turbofit.machine.source import machine_from
    from turbofit.model.quantize.fit import quantizing
    from turbofit.model.quantize.program import Request
    from turbofit.model.source import refuse_missing_folder, resolve_model
    from turbofit.report.views.quantize_view import Typed, quantizing_view

    if out is not None:
        refuse_missing_folder(model)
    machine = machine_from(on, gpus=gpus)
    with under_way("reading the checkpoint"):
        known = resolve_model(model, revision=revision)
    if read is not None:
        program = {
            "samples": samples, "calib_samples": calib_samples, "calib_seqlen": calib_seqlen,
            "out": out,
        }  # fmt: skip
        refuse_together(program, "--read")
        return _read(known, read, machine, form)
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
    typed = Typed(start=_start(model, revision, on, gpus), samples=samples, out=out)
    form.show(made, lambda document: quantizing_view(document, typed))
    return code


def _start(model: str, revision: str | None, on: str | None, gpus: str | None) -> tuple[str, ...]:
    """Return the words that name model and machine, as they were typed."""
    options = {"--revision": revision, "--on": on, "--gpus": gpus}
    given = [(name, value) for name, value in options.items() if value is not None]
    return (model, *chain.from_iterable(given))


def _read(model: Model, folder: str, machine: Machine, form: Form) -> int:
    """Show whether LMDeploy reads the checkpoint in ``folder``, and its plan; exit 3 if not."""
    from turbofit import api
    from turbofit.model.quantize.read import read_result
    from turbofit.report.views.quantize_view import reading_view

    with under_way("reading the packed weights"):
        reading = read_result(model, folder)
    plan = api.plan(folder, on=machine) if reading.good else None
    form.show({"reading": reading, "plan": plan}, lambda _: reading_view(reading, plan))
    serves = plan is not None and plan.fits
    return 0 if serves else DoesNotFitError.exit_code


def _named(model: Model, typed: str) -> str:
    """Return the checkpoint's folder, or its hub id, as Transformers takes it."""
    return model.source.where if model.source.kind == "folder" else model.hub_id or typed
