"""``turbofit download`` and ``merge``: a checkpoint on disk, merged with a LoRA or converted."""

from __future__ import annotations

import os

import click

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options.common_options import FORMS, model_argument
from turbofit.cli.terminal.output import Form, answer, say
from turbofit.core.errors import LaunchError, UsageError
from turbofit.core.process.progress import under_way
from turbofit.core.process.signals import ended_like_ctrl_c
from turbofit.planning.request import PlanRequest


@command(*model_argument(), only_linux=True)
def download(*, model: str, revision: str | None) -> int:
    from turbofit.launch.serve.weights import fetched
    from turbofit.planning.resolve import model_of

    try:
        known = model_of(PlanRequest(model=model, revision=revision))
        folder = fetched(known, say).source.checkpoint
    except UsageError as exc:
        folder = _fetched_for_merge(model, revision, exc)
    if folder is None:
        raise UsageError(
            f"{model} has no repository that is known here",
            hint="give a hub id: turbofit models lists them",
        )
    answer(f"{folder}\n")
    return 0


def _fetched_for_merge(name: str, revision: str | None, refused: UsageError) -> str:
    """The folder of a repository that is no model here, such as a LoRA or LLaVA's own format.

    Raises:
        UsageError: the model's refusal, if the name is no hub id or the hub does not have it.
    """
    from turbofit.launch.serve.weights import fetched_files
    from turbofit.model.merge.files import repository_of

    hub_id, named = repository_of(name, revision)
    if hub_id is None:
        raise refused
    say(f"{refused.message}; its files are fetched for turbofit merge")
    try:
        return fetched_files(hub_id, named, say)
    except LaunchError as exc:
        refused.message += f"; {exc.message}"
        raise refused from None


@command(
    Argument("folders", metavar="BASE [ADAPTER] OUT", nargs=-1, required=True),
    Option("--vision-tower", metavar="FOLDER", type=PATH),
    Option("--dtype", type=click.Choice(("float16", "bfloat16", "float32"))),
    *FORMS,
)
def merge(
    *,
    folders: tuple[str, ...],
    vision_tower: str | None,
    dtype: str | None,
    form: Form,
) -> int:
    from turbofit.model.merge.merge import merge as merge_checkpoint
    from turbofit.model.presets import find_preset
    from turbofit.report.views.preset_view import merged_view

    if len(folders) not in (2, 3):
        raise UsageError(
            f"{len(folders)} folders were named", hint="turbofit merge BASE [ADAPTER] OUT"
        )
    base, *adapter, out = folders
    if adapter and find_preset(adapter[0]) and not os.path.exists(adapter[0]):
        order = f"turbofit merge {adapter[0]} {'LORA' if find_preset(base) else base} {out}"
        hint = f"a LoRA is merged into its base, which stands first: {order}"
        raise UsageError(f"{adapter[0]} is a model, and no LoRA", hint=hint)
    with ended_like_ctrl_c(), under_way("reading the checkpoint"):
        merged = merge_checkpoint(
            base, next(iter(adapter), None), out,
            vision_tower=vision_tower, dtype=dtype, say=say,
        )  # fmt: skip
    form.show(merged, merged_view)
    return 0
