"""``turbofit rehearse --engine pytorch|transformers``: from what was asked to the document."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbofit.core.draft import DRAFT_OPTIONS, Draft
from turbofit.core.errors import PackageError, UsageError
from turbofit.core.images import ImageRule
from turbofit.core.json_types import Document, Options
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.memory.engine import default_batch_size
from turbofit.model.source import resolve_model
from turbofit.pretend.scenario import Scenario
from turbofit.rehearse.checkpoint.draft_twin import speculative_of
from turbofit.rehearse.checkpoint.twin import checkpoint_for
from turbofit.rehearse.torch.torch_drivers import DRIVERS
from turbofit.rehearse.torch.torch_image_overlap import ServerRoom
from turbofit.rehearse.torch.torch_report import torch_report
from turbofit.rehearse.torch.torch_run import need_kernels, need_packages, run_torch
from turbofit.rehearse.torch.torch_spec import TorchCase, TorchSpec
from turbofit.rehearse.torch.torch_worst import rehearsed_size, torch_cases

__all__ = ["TorchRehearsal", "rehearse_torch"]

#: LMDeploy's default, by which requests meet in one forward.
_PREFILL = 8192
#: Keywords of the Python interface that are no settings of the engine.
_KEYWORDS = frozenset(
    {"engine", "images", "image_size", "max_dynamic_patch", "max_pixels", "revision"}
)


@dataclass(frozen=True)
class TorchRehearsal:
    """What to rehearse.

    Attributes:
        model: a checkpoint's folder, a hub id or a preset's name.
        engine: ``pytorch`` or ``transformers``.
        settings: LMDeploy's own options, only those that were given.
        images, image_size, max_dynamic_patch, max_pixels: the worst request, in part or whole.
        cases: drive these cases only, by name; empty: all.
        revision: branch, tag or commit on the hub.
        speculative: the fields of a `PlanRequest` that are about speculative decoding.
    """

    model: str
    engine: str = "pytorch"
    settings: Mapping[str, Any] = field(default_factory=dict)
    images: int = 1
    image_size: tuple[int, int] | None = None
    max_dynamic_patch: int | None = None
    max_pixels: int | None = None
    cases: tuple[str, ...] = ()
    revision: str | None = None
    speculative: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, keywords: Options) -> TorchRehearsal:
        """From keywords: fields of this class but for ``settings`` and ``cases``, and settings.

        TurboMind's name of a KV block's size is taken too.
        """
        names = _KEYWORDS & keywords.keys()
        settings = {name: value for name, value in keywords.items() if name not in names}
        if "cache_block_seq_len" in settings:
            settings["block_size"] = settings.pop("cache_block_seq_len")
        settings = {name: value for name, value in settings.items() if value is not None}
        drafting = {name: settings.pop(name) for name in [*settings] if name in DRAFT_OPTIONS}
        given = {name: keywords[name] for name in names}
        return cls(model, settings=settings, speculative=drafting, **given)

    def draft(self, model: Model) -> Draft | None:
        """What drafts, read.

        Raises:
            UsageError: nothing can, or LMDeploy would not run it.
        """
        told = [self.speculative.get(name) for name in DRAFT_OPTIONS]
        if not any(told):
            return None
        from turbofit.model.draft_reader import requested_draft

        return requested_draft(model, *told)


def rehearse_torch(
    request: TorchRehearsal,
    scenario: Scenario,
    machine: Machine | None = None,
    keep: Path | None = None,
) -> Document:
    """Runs the engine itself on the pretend machine and returns the document of ``torch_report``.

    Args:
        request: what to rehearse.
        scenario: the machine; its ``context`` is charged to each process.
        machine: what the scenario was made of, for the document.
        keep: where to leave timelines and log; by default they are removed.

    Raises:
        UsageError: the request cannot be meant.
        PackageError: torch is no CUDA build, or another package is missing.
    """
    tp = int(request.settings.get("tp") or 1)
    if tp > len(scenario.gpus):
        raise UsageError(
            f"--tp {tp} needs {tp} GPUs, the machine has {len(scenario.gpus)}",
            hint="name a machine with as many: --on 2xrtx3090",
        )
    ray = tp > 1 and request.settings.get("distributed_executor_backend") in (None, "ray")
    versions = need_packages(request.engine, ray=ray)
    with tempfile.TemporaryDirectory(prefix="turbofit-rehearsal-") as scratch:
        name, rule, sees, folder, speculative = _model(request, Path(scratch))
        size = _size(request, rule) if sees and request.images else None
        cases = _cases(request, rule, size, scenario)
        settings = dict(request.settings)
        if not DRIVERS[request.engine].batches:
            settings.setdefault("device_map", "auto" if len(scenario.gpus) > 1 else {"": 0})
        elif settings.get("max_batch_size") is None:
            settings.pop("max_batch_size", None)
        spec = TorchSpec(request.engine, folder, settings, cases, speculative=speculative)
        seen = run_torch(spec, scenario, keep)
    about = {
        "model": {"name": name, "asked": request.model, "twin": folder.is_relative_to(scratch)},
        "machine": machine.name if machine else None,
        "given": {**request.settings, **request.speculative},
        "worst_image": _image(rule, size),
    }
    return torch_report(seen, versions, about)


def _model(
    request: TorchRehearsal, scratch: Path
) -> tuple[str, ImageRule | None, bool, Path, Mapping[str, Any]]:
    """Name, image rule, whether it takes images, a folder, and what LMDeploy is told of drafts.

    A folder of a model that turbofit has no account of is taken as it is; so are its pictures.
    """
    folder = Path(request.model).expanduser()
    try:
        model: Model = resolve_model(request.model, revision=request.revision)
    except (UsageError, PackageError):
        if not (folder / "config.json").is_file():
            raise
        text = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
        return folder.name, None, '"vision_config"' in text, folder.resolve(), {}
    # Chat templates are chosen by the folder's name, so the twin keeps the model's.
    batches, draft = DRIVERS[request.engine].batches, request.draft(model)
    if batches:
        need_kernels(model.text)
    folder = checkpoint_for(model, scratch / model.name, torch=not batches, draft=draft).resolve()
    speculative = speculative_of(draft, model, scratch)
    text_only = bool(request.settings.get("language_model_only"))
    sees = model.vision is not None and not text_only
    return model.name, model.image_rule, sees, folder, speculative


def _size(request: TorchRehearsal, rule: ImageRule | None) -> tuple[int, int]:
    if request.image_size is not None:
        if request.max_dynamic_patch or request.max_pixels:
            raise UsageError(
                "--image-size and a limit both say how large a picture is", hint="give one of them"
            )
        if rule is not None:
            rule.units(*request.image_size)  # the preprocessor's own refusals
        return request.image_size
    if rule is None:
        raise UsageError(
            f"turbofit does not know how {request.model} takes pictures",
            hint="say how large its worst picture is: --image-size 1344x1344",
        )
    return rehearsed_size(rule, getattr(request, rule.limit_name))


def _cases(
    request: TorchRehearsal,
    rule: ImageRule | None,
    size: tuple[int, int] | None,
    scenario: Scenario,
) -> tuple[TorchCase, ...]:
    if not DRIVERS[request.engine].batches:
        made = torch_cases(rule, size, images=request.images)
    else:
        batch = default_batch_size(scenario.gpus[0].name)
        given = request.settings
        room = ServerRoom(
            batch=int(given.get("max_batch_size") or batch),
            prefill=int(given.get("max_prefill_token_num") or _PREFILL),
            prefix_caching=bool(given.get("enable_prefix_caching")),
        )
        made = torch_cases(rule, size, images=request.images, room=room)
    unknown = sorted(set(request.cases) - {case.name for case in made})
    if unknown:
        raise UsageError(
            f"there is no case {unknown[0]}", hint=f"{', '.join(case.name for case in made)}"
        )
    return tuple(case for case in made if not request.cases or case.name in request.cases)


def _image(rule: ImageRule | None, size: tuple[int, int] | None) -> dict[str, Any] | None:
    if size is None:
        return None
    seen = rule.units(*size) if rule else None
    tokens = rule.tokens(*size) if rule else None
    return {"width": size[0], "height": size[1], "units": seen, "tokens": tokens}
