"""``turbofit pretend --on SPEC -- COMMAND…``: any command on pretend GPUs, with its memory."""

from __future__ import annotations

from typing import Final

from turbofit.cli.command import PATH, Option, command
from turbofit.cli.options.common_options import spec_option
from turbofit.cli.terminal.output import Form, answer, note
from turbofit.core.errors import UsageError
from turbofit.core.units import parse_bytes

_USAGE: Final = "turbofit pretend --on SPEC [options] -- COMMAND ..."
#: Said after a failure: such a torch says only "Torch not compiled with CUDA enabled".
_CPU_TORCH: Final = (
    "torch in this environment is a CPU build, which uses no GPU: scripts/without-gpu --pytorch"
    " installs one for CUDA, which runs on pretend GPUs (docs/pretend.md)"
)


@command(
    spec_option(),
    Option("--model", metavar="NAME"),
    Option("--keep", metavar="DIR", type=PATH),
    Option("--context", metavar="BYTES"),
    Option("--python", metavar="PATH", type=PATH),
    Option("--json", "as_json", is_flag=True, form=True),
    takes_rest=True,
    only_linux=True,
    usage="--on SPEC [OPTIONS] -- COMMAND ...",
)
def pretend(
    *,
    on: str | None,
    model: str | None,
    keep: str | None,
    context: str | None,
    python: str | None,
    form: Form,
    rest: list[str],
) -> int:
    """Run the command on pretend GPUs, report its memory, and exit with its code.

    ``model`` is what the command opens by `turbofit.pipeline`: if its weights are not here, the
    command gets a checkpoint without weights.
    """
    import json
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from turbofit.machine.presets import context_bytes
    from turbofit.machine.source import machine_from
    from turbofit.planning.examine.packages import torch_cuda
    from turbofit.planning.examine.scene import Sources
    from turbofit.rehearsal.pretend.run import NOTICE, report, run_pretend, scenario_of
    from turbofit.report.painters.terminal import paint
    from turbofit.report.views.measured_view import pretend_view

    context_size = None if context is None else parse_bytes(context, what="--context")
    if not on:
        raise UsageError("--on SPEC is missing", hint=f"{_USAGE}, e.g. --on 2xrtx3090")
    if not rest:
        raise UsageError("no command", hint=_USAGE)
    scenario = scenario_of(
        machine_from(on),
        lambda gpu: context_bytes(gpu)[0] if context_size is None else context_size,
    )
    note(NOTICE)
    folder = Path(keep) if keep else None
    with TemporaryDirectory(prefix="turbofit-pretend-") as twin:
        environment = None
        if model:
            from turbofit.model.source import resolve_model
            from turbofit.rehearsal.turbomind.server import program_environment

            environment = program_environment(resolve_model(model), scenario, Path(twin))
        ran = run_pretend(
            rest,
            scenario,
            keep=folder,
            stdout=2 if form.as_json else None,
            base=environment,
            python=python,
        )
    document = report(ran)
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if folder is not None:
        (folder / "report.json").write_text(text, encoding="utf-8")
    if form.as_json:
        answer(text)
    else:
        note(f"\n{paint(pretend_view(document), width=100)}".rstrip("\n"))
    if ran.exit_code and torch_cuda(Sources()) == "":
        note(_CPU_TORCH)
    return ran.exit_code
