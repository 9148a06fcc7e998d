"""Resolves a request: reads the model and the machine, as the input of the search."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.messages import counted
from turbofit.core.model import Model
from turbofit.core.plan import THINKING_TOKENS
from turbofit.core.units import GIB
from turbofit.machine.source import machine_from
from turbofit.model.adapters import with_adapters
from turbofit.model.drafts import with_draft
from turbofit.model.overrides import overridden
from turbofit.model.source import resolve_model
from turbofit.planning.calibrations import pretends, with_calibrations
from turbofit.planning.request import PlanRequest
from turbofit.planning.resolved_request import ResolvedRequest, with_image_limit

#: The hint for two options that exclude each other.
_ONE_OF: Final = "give only one of the two"
#: The least margin of a draft whose account no rehearsal has confirmed.
_COUNTED_MARGIN: Final = GIB


def resolve(request: PlanRequest) -> ResolvedRequest:
    """Read the model, measure the machine, and refuse contradictory options.

    Raises:
        UsageError: two options contradict each other, or one cannot be used.
        MachineError: this machine cannot be read, or has no GPU.
        PackageError: a package that reads the model is missing.
    """
    model = model_of(request)
    if request.hf_overrides is not None:
        model, overrides = overridden(model, request.hf_overrides)
        request = request.changed(hf_overrides=overrides)
    if request.adapters is not None:
        model = with_adapters(
            model,
            request.adapters,
            only_text=bool(request.language_model_only),
            typed=request.model if isinstance(request.model, str) else "",
        )
        words = [f"{adapter.name}={adapter.path}" for adapter in model.loras]
        request = request.changed(adapters=tuple(words))
    model = with_draft(
        model,
        request.speculative_algorithm,
        request.speculative_draft_model,
        request.speculative_num_draft_tokens,
    )
    if model.draft:
        path, tokens = model.draft.path or None, model.draft.tokens
        request = request.changed(speculative_draft_model=path, speculative_num_draft_tokens=tokens)
    margin = request.margins
    if model.draft and model.draft.is_own:
        margin = replace(margin, least=_COUNTED_MARGIN)
    request = request.with_maximum(model.text.max_position_embeddings)
    machine = machine_from(request.on, gpus=request.gpus)
    if machine.source == "nvml":
        machine = with_calibrations(machine, pretend=pretends())
    workload = request.workload
    if request.output_tokens is None and model.thinks:
        workload = replace(workload, output_tokens=THINKING_TOKENS)
    resolved = ResolvedRequest(
        model=model,
        machine=machine,
        workload=workload,
        engine_options=request.engine_options,
        tp=request.tp,
        replicas=request.replicas,
        margin=margin,
        budget=request.budget,
        least=request.least,
        options=request.options,
        image_threads=request.image_threads,
        image_cache=request.image_cache,
    )
    resolved = with_image_limit(resolved, request.max_dynamic_patch, request.max_pixels)
    _check(request, resolved)
    return resolved


def model_of(request: PlanRequest) -> Model:
    """Return the model of the request; a model that the request only names is read.

    Raises:
        UsageError: the model is unknown.
        PackageError: a package that reads it is missing.
    """
    model, revision = request.model, request.revision
    if isinstance(model, str):
        model = resolve_model(model, revision=revision, model_format=request.model_format)
    return model if revision is None else replace(model, revision=revision)


def _check(request: PlanRequest, resolved: ResolvedRequest) -> None:
    """Refuse options that contradict each other or the model, before the search."""
    if request.least and request.goal != "throughput":
        raise UsageError(
            f"`--least` decides by memory, `--goal {request.goal}` by something else", hint=_ONE_OF
        )
    _check_context(resolved)
    if request.images and "images" in request.given():
        if resolved.model.image_rule is None:
            raise UsageError(
                f"{resolved.model.name} takes no images",
                hint="leave `--images` out",
            )
        if request.language_model_only:
            raise UsageError(
                f"`--images {request.images}` asks for images, and `--language-model-only` serves"
                " none",
                hint=_ONE_OF,
            )
    _check_batch(request, resolved)


def _check_context(resolved: ResolvedRequest) -> None:
    """Refuse two options for the context, and a context beyond the model's own."""
    context, longest = resolved.workload.context, resolved.model.text.max_position_embeddings
    if context is None:
        return
    if "session_len" in resolved.engine_options:
        raise UsageError("`--context` and `--session-len` are one setting", hint=_ONE_OF)
    if context > longest:
        raise UsageError(
            f"{resolved.model.name} reads {longest} tokens, not {context}",
            hint=f"`--context {longest}` at most",
        )


def _check_batch(request: PlanRequest, resolved: ResolvedRequest) -> None:
    """Refuse a batch that is too small for the promised requests on any number of engines."""
    batch, requests = request.max_batch_size, request.concurrency
    visible = len(resolved.machine.visible)
    if batch is None or requests is None or not visible:  # the GPUs of a cluster are not known here
        return
    most = request.replicas or max(1, visible // (request.tp or 1))
    if requests > batch * most:
        engines = counted(most, "engine")
        raise UsageError(
            f"`--max-batch-size {batch}` runs {counted(batch * most, 'request')} at once on"
            f" {engines}, not `--concurrency {requests}`",
            hint=f"give `--concurrency {batch * most}` at most, or leave `--max-batch-size` out",
        )
