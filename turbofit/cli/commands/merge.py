"""``turbofit merge``: a checkpoint merged with a LoRA, or converted."""

from __future__ import annotations

from turbofit.cli.command import PATH, Argument, Option, command
from turbofit.cli.options.common_options import FORMS
from turbofit.cli.terminal.output import Form
from turbofit.core.errors import UsageError
from turbofit.core.messages import counted
from turbofit.core.process.progress import under_way
from turbofit.core.process.signals import ended_like_ctrl_c


@command(
    Argument("folders", metavar="BASE [ADAPTER] OUT", nargs=-1, required=True),
    Option("--vision-tower", metavar="FOLDER", type=PATH),
    *FORMS,
)
def merge(
    *,
    folders: tuple[str, ...],
    vision_tower: str | None,
    form: Form,
) -> int:
    """Write a checkpoint in which a LoRA is merged, or a LLaVA checkpoint in the hf format."""
    from turbofit.model.merge.merge import merge as merge_checkpoint
    from turbofit.report.views.preset_view import merged_view

    if len(folders) not in (2, 3):
        raise UsageError(
            f"{counted(len(folders), 'folder')} named", hint="turbofit merge BASE [ADAPTER] OUT"
        )
    base, *adapter, out = folders
    with ended_like_ctrl_c(), under_way("reading the checkpoint"):
        merged = merge_checkpoint(base, next(iter(adapter), None), out, vision_tower=vision_tower)
    form.show(merged, merged_view)
    return 0
