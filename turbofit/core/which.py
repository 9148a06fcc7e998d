"""Which cards keep a promise, or which models a machine serves: `turbofit which`."""

from __future__ import annotations

from typing import Annotated, Final

from turbofit.core.struct import Struct, const, doc

WHICH_SCHEMA: Final = "turbofit.which/1"


class Serving(Struct):
    """One model on one machine: what `turbofit plan` finds there, in short."""

    model: str
    on: Annotated[str, doc("The machine, as --on takes it.")]
    gpus: Annotated[int, doc("GPUs of the machine.")]
    bytes: Annotated[int, doc("Bytes of all of them.")]
    keeps: Annotated[
        bool,
        doc("Whether the plan fits, with images as large and as many a second as were asked."),
    ]
    why_not: Annotated[str, doc("What is missing; empty where the promise is kept.")] = ""
    missing: Annotated[
        int,
        doc("Bytes that the tightest GPU lacks, at least; 0 where it lacks something else."),
    ] = 0
    engine: Annotated[str | None, doc("Null where no engine can be asked.")] = None
    tp: Annotated[int, doc("GPUs of one engine.")] = 0
    replicas: Annotated[int, doc("Engines side by side.")] = 0
    kv_tokens: Annotated[int, doc("KV tokens of all engines.")] = 0
    context: Annotated[int, doc("Tokens that one request may have.")] = 0
    image_limit: Annotated[
        int | None, doc("Tiles or pixels of an image; null where no images are served.")
    ] = None
    requests_at_once: int = 0
    requests_per_second: Annotated[
        float | None, doc("A forecast, never a promise; null where there is none.")
    ] = None
    output_tokens_per_second: float | None = None
    seconds_to_first_token: float | None = None


class Which(Struct):
    """The machines that keep a promise, the smallest first; or the models, the largest first.

    A machine is smaller that has fewer bytes of GPU memory, then fewer GPUs. A model is larger that
    has more bytes of weights.
    """

    schema: Annotated[str, const(WHICH_SCHEMA)] = WHICH_SCHEMA
    turbofit_version: Annotated[str, doc("The version that planned.")]
    created: Annotated[str, doc("When, ISO 8601 with a zone.")]
    model: Annotated[str | None, doc("The model that was asked about; null: all presets.")]
    machine: Annotated[str | None, doc("The machine that was asked about; null: all presets.")]
    request: Annotated[dict[str, object], doc("What was asked beside them, by turbofit's names.")]
    counts: Annotated[
        tuple[int, ...], doc("GPUs of a machine that were tried; empty where it was given.")
    ]
    keep: Annotated[tuple[Serving, ...], doc("Those that keep the promise.")]
    others: Annotated[tuple[Serving, ...], doc("The others, each with what is missing.")]
