"""The request of a person for a plan, validated once and then passed through all steps."""

from __future__ import annotations

import json
import re
from math import prod
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from turbofit.core.errors import UsageError
from turbofit.core.images.rule import LARGEST_PIXELS, LONGEST_SIDE
from turbofit.core.machine import Machine
from turbofit.core.model import Model
from turbofit.core.plan import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    THINKING_TOKENS,
    EngineName,
    Goal,
    Workload,
)
from turbofit.core.units import parse_bytes, parse_share, plain_number
from turbofit.core.validation import (
    LARGEST,
    Metavar,
    Positive,
    Validated,
    checked,
    parsed,
    whole,
)
from turbofit.core.version import REFERENCE
from turbofit.planning.resolved_request import Margin

EngineChoice = Literal["auto", EngineName]

#: The most requests at once; no engine runs so many.
_MOST_AT_ONCE: Final = 1 << 20
_DTYPES: Final = {"fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_THOUSANDS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20}
_COUNTED: Final = re.compile(r"(\d{1,9})\s*([km]?)", re.IGNORECASE)
_PART: Final = re.compile(r"0?\.\d+|1(?:\.0+)?")
_SIDES: Final = re.compile(r"([\d,]{1,11})\s*[x×*]\s*([\d,]{1,11})|(\d{3,5})", re.IGNORECASE)
_PRODUCT: Final = re.compile(r"\d{1,7}(?: ?[x×*] ?\d{1,7}){1,2}", re.IGNORECASE)
_MEGAPIXELS: Final = re.compile(r"(\d{1,4}(?:\.\d{1,3})?) ?(?:m|mp|megapixels?)", re.IGNORECASE)
#: Names of picture sizes with one meaning.
_NAMED_SIZES: Final = {
    "720p": (1280, 720), "1080p": (1920, 1080), "1440p": (2560, 1440), "2160p": (3840, 2160),
    "4k": (3840, 2160),
}  # fmt: skip
_QUANT_POLICIES: Final = {
    "none": 0, "int4": 4, "4-bit": 4, "int8": 8, "8-bit": 8,
    "fp8": 16, "fp8_e4m3": 16, "fp8_e5m2": 17, "turbo_quant": 42,
    **{str(number): number for number in (0, 4, 8, 16, 17, 42)},
}  # fmt: skip
#: Options that a plan states elsewhere: its model, its machine, its GPUs and its engine.
_OF_A_PLACE: Final = frozenset({"model", "on", "gpus", "lmdeploy"})

#: The headings of help pages, each with its fields; the fields of `ENGINE_OPTIONS` come after them.
GROUPS: Final = {
    "shape": ("tp", "replicas", "engine"),
    "workload": (
        "images", "image_size", "context", "concurrency", "goal", "queue_images",
        "prompt_tokens", "output_tokens",
    ),
    "limits and budgets": (
        "max_dynamic_patch", "max_pixels", "image_threads", "image_cache", "margin", "budget",
        "least", "no_tuned",
    ),
}  # fmt: skip


def _share(text: str, name: str) -> int | str:
    if name.endswith("budget") and _PART.fullmatch(text):  # as vLLM writes a share of a card
        text = f"{100 * float(text):g}%"
    # A margin of the whole card leaves nothing to plan with.
    share = parse_share(text, name, 1.0 if name.endswith("margin") else 1.001)
    return parse_bytes(text, what=name) if share is None else text.strip()


def _ratio(text: str, name: str) -> float | str:
    share = parse_share(text, name)
    return text if share is None else share


def _size(text: str, name: str) -> tuple[int, int]:
    if named := _NAMED_SIZES.get(text.strip().lower()):
        return named
    sides = _SIDES.fullmatch(text.strip())
    pixels = [plain_number(side) for side in sides.groups() if side] if sides else []
    if not pixels or not all(map(str.isdigit, pixels)):
        raise UsageError(
            f"{name} {text!r} is not WIDTHxHEIGHT", hint="write it as 1920x1080 in pixels"
        )
    return int(pixels[0]), int(pixels[-1])


def _accepted(size: tuple[int, int], name: str) -> tuple[int, int]:
    """Refuse a size that the gateway refuses in each request."""
    width, height = size
    if width * height > LARGEST_PIXELS:
        raise UsageError(
            f"{name} {width}x{height} has {width * height:,} pixels",
            hint=f"an image of a request has at most {LARGEST_PIXELS:,} pixels",
        )
    return size


def _pixels(text: str, name: str) -> str | int:
    """Parse pixels: ``1280*28*28`` as on models' pages, ``12.8 MP`` as from `turbofit models`."""
    plain = plain_number(text.strip())
    if _PRODUCT.fullmatch(plain):
        return prod(map(int, re.findall(r"\d+", plain)))
    if megapixels := _MEGAPIXELS.fullmatch(plain):
        return round(float(megapixels[1]) * 1_000_000)
    return whole(text, name)


def _tokens(text: str, name: str) -> str | int:
    """Parse ``32k`` as 32,768, as in models' names; other numbers are parsed by `whole`."""
    counted = _COUNTED.fullmatch(plain_number(text.strip()))
    return int(counted[1]) * _THOUSANDS[counted[2].lower()] if counted else whole(text, name)


def _context(text: str, name: str) -> str | int:
    """Parse tokens as `_tokens`, but keep ``max``: the model determines its value."""
    return "max" if text.strip().lower() == "max" else _tokens(text, name)


def _dtype(text: str, _name: str) -> str | None:
    return None if text == "auto" else _DTYPES.get(text.lower(), text)  # "auto": as if not given


def _json(value: object) -> object:
    """Write a dict as JSON, the form of a command line; configs of LMDeploy have a dict."""
    return json.dumps(value) if isinstance(value, dict) else value


def _named_paths(value: object) -> object:
    """Write a dict of paths by name as words NAME=PATH; configs of LMDeploy have a dict."""
    if isinstance(value, dict):
        return tuple(f"{name}={path}" for name, path in value.items())
    return value


#: Requests at once; limited, since lists of a batch's length are made.
AtOnce = Annotated[int, Field(ge=1, le=_MOST_AT_ONCE), parsed(whole), Metavar("N")]
Pixels = Annotated[int, Field(ge=1, le=LARGEST_PIXELS), parsed(_pixels), Metavar("PIXELS")]
Count = Annotated[int, Field(ge=0, le=LARGEST), parsed(whole), Metavar("N")]
Tokens = Annotated[int, Field(ge=1, le=LARGEST), parsed(_tokens), Metavar("TOKENS")]
TokensOrNone = Annotated[int, Field(ge=0, le=LARGEST), parsed(_tokens), Metavar("TOKENS")]
Context = Annotated[
    Annotated[int, Field(ge=1, le=LARGEST)] | Literal["max"] | None,
    parsed(_context),
    Metavar("TOKENS|max"),
]
#: Accepts a list or a tuple; each item must have its type.
Batches = Annotated[tuple[Positive, ...], Field(strict=False)]
Side = Annotated[int, Field(ge=1, le=LONGEST_SIDE), parsed(whole)]
Size = Annotated[
    tuple[Side, Side],
    Field(strict=False),
    parsed(_size, numbers=True),
    checked(_accepted),
    Metavar("WxH"),
]
Bytes = Annotated[
    int,
    Field(ge=0),
    parsed(lambda text, name: parse_bytes(text, what=name)),
    Metavar("BYTES"),
]


class PlanRequest(Validated):
    """A request: a model, a machine, a workload, and the given options.

    Turbofit chooses the options that are None. Sizes are bytes, or texts such as ``"19GiB"``.

        >>> request = turbofit.PlanRequest(model="internvl2-8b", on="4xrtx3090", concurrency=16)
        >>> turbofit.plan(request).fits
        True
        >>> smaller = request.changed(max_batch_size=4)
    """

    model: str | Model = Field(
        description="a folder, a hub id or its address, or a name that `turbofit models` lists"
    )
    on: Annotated[str | Machine | None, Metavar("SPEC")] = Field(
        default=None,
        description="the machine: 4xrtx3090, rtx3090+rtx4090, 1xl4:free=19GiB, 2x24GB, "
        "a100-80g:mig=3g.40gb, what nvidia-smi prints (on the command line - reads it from stdin), "
        "or a snapshot's path (default: this one, through NVML)",
    )
    gpus: Annotated[str | None, Metavar("LIST")] = Field(
        default=None,
        description="only these GPUs: PCI indices or UUIDs, inside CUDA_VISIBLE_DEVICES",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    engine: EngineChoice = Field(
        default="auto",
        description="auto is the first engine that runs the model with the given options, or the "
        "PyTorch engine if it serves more of the request",
    )

    tp: Positive | None = Field(default=None, description="GPUs of one engine")
    replicas: Positive | None = Field(default=None, description="engines side by side")

    images: Count = Field(default=1, description="images a request; --image-size is their size")
    image_size: Size | None = Field(
        default=None,
        description="their width and height (default: the worst that the model's rule admits)",
    )
    context: Context = Field(
        default=None,
        description="tokens that one request may have, answer included; max is the model's own "
        "maximum (default: the maximum up to 32,768, lowered to what the cache holds)",
    )
    concurrency: AtOnce | None = Field(
        default=None,
        description="requests at once over all replicas, which their caches must hold together "
        "(default: the fewest that give 99% of the most requests a second by the forecast)",
    )
    goal: Goal = Field(default="throughput", description="what decides between shapes that serve")
    queue_images: bool | None = Field(
        default=None,
        description="image requests wait for each other's prefill in the gateway; the peak pays "
        "for one request's images, and the cache gets the rest (default: if this serves more)",
    )

    prompt_tokens: Tokens | None = Field(
        default=None,
        description=f"tokens of text of a request, by which requests at once and the forecast are"
        f" counted (default {PROMPT_TOKENS})",
    )
    output_tokens: Tokens | None = Field(
        default=None,
        description=f"tokens of an answer, likewise (default {OUTPUT_TOKENS}; {THINKING_TOKENS:,}"
        " of a model that thinks)",
    )

    max_dynamic_patch: Positive | None = Field(
        default=None, description="tiles an image, for InternVL"
    )
    max_pixels: Pixels | None = Field(
        default=None, description="pixels an image, for Qwen2-VL: 1003520, 1280*28*28 or 1 MP"
    )
    image_threads: Annotated[int, Field(ge=1, le=64), parsed(whole), Metavar("N")] | None = Field(
        default=None,
        description="threads of each engine of LMDeploy that prepare images; 1 is LMDeploy's own "
        "way (default: the engine's share of the cores but one, 2 to 16)",
    )
    image_cache: Bytes | None = Field(
        default=None,
        description="host memory in which each engine of LMDeploy keeps prepared images; 0 keeps "
        "none (default: an eighth of what is left, at most 4GiB)",
    )
    margin: Annotated[int | str | None, parsed(_share, numbers=True), Metavar("BYTES|%")] = Field(
        default=None,
        description="left free on each GPU, in bytes or as a share of the card (default: the "
        "larger of 256MiB and 1%)",
    )
    budget: Annotated[
        Annotated[int, Field(ge=0)] | str | None, parsed(_share, numbers=True), Metavar("BYTES|%")
    ] = Field(
        default=None,
        description="the most that this turbofit may take of each GPU, margin included, in bytes "
        "or as a share of the card",
    )
    least: bool = Field(
        default=False,
        description="the smallest cache, batch and buffers that keep the promise: the image "
        "limit, --context or one request, --concurrency or one; the rest stays for others",
    )
    no_tuned: bool = Field(
        default=False, description="ignore what `turbofit tune` found on these GPUs"
    )
    lmdeploy: Annotated[str | None, Metavar("VERSION")] = Field(
        default=None, description=f"LMDeploy's version (default {REFERENCE})"
    )

    # LMDeploy's own options with its names, in the order of plans.
    cache_max_entry_count: Annotated[float | None, parsed(_ratio), Metavar("RATIO")] = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the free memory that the cache gets, between 0 and 1",
    )
    max_prefill_token_num: Tokens | None = Field(default=None, description="tokens of one prefill")
    max_batch_size: AtOnce | None = Field(default=None, description="requests that run at once")
    session_len: Context = Field(default=None, description="tokens of a request, answer included")
    communicator: Literal["nccl", "native", "cuda-ipc"] | None = Field(
        default=None, description="TurboMind: how the GPUs of an engine reach each other"
    )
    dtype: Annotated[
        Literal["float16", "bfloat16"] | None, parsed(_dtype), Metavar("auto|float16|bfloat16")
    ] = Field(default=None, description="of weights and activations (default: the checkpoint's)")
    quant_policy: Annotated[
        Literal[0, 4, 8, 16, 17, 42] | None,
        parsed(lambda text, _: _QUANT_POLICIES.get(text.lower(), text)),
        Metavar("0|4|8"),
    ] = Field(
        default=None,
        description="bits of the KV cache: 0, 4 or 8 (none, int4, int8); PyTorch engine: 16, 17 or "
        "42 (fp8, fp8_e5m2, turbo_quant) as well",
    )
    cache_block_seq_len: Tokens | None = Field(default=None, description="tokens of a cache block")
    model_format: Literal["hf", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4"] | None = Field(
        default=None, description="how the weights are stored (default: as the config says)"
    )
    enable_prefix_caching: bool | None = Field(
        default=None, description="keep the cache of prompts that begin alike"
    )
    prefix_cache_state_budget: Count | None = Field(
        default=None,
        description="PyTorch engine: slots that keep states of gated delta nets for the prefix "
        "cache",
    )
    async_: Annotated[int | None, Field(ge=0, le=1), Metavar("0|1")] = Field(
        default=None, description="TurboMind: prepare a step while another runs"
    )
    language_model_only: bool | None = Field(
        default=None, description="without the vision encoder; images are then refused"
    )
    num_gpu_blocks: Positive | None = Field(
        default=None, description="PyTorch engine: blocks of the cache, instead of a ratio"
    )
    eager_mode: bool | None = Field(default=None, description="PyTorch engine: no CUDA graphs")
    cudagraph_capture_batch_sizes: Batches | None = Field(
        default=None, description="PyTorch engine: batches that get a CUDA graph"
    )
    distributed_executor_backend: Literal["uni", "mp", "ray"] | None = Field(
        default=None, description="PyTorch engine: who runs its ranks"
    )
    hf_overrides: Annotated[str | None, BeforeValidator(_json), Metavar("JSON")] = Field(
        default=None,
        description="keys of config.json that LMDeploy changes: max_position_embeddings, and "
        "rope_scaling for a longer context",
    )
    adapters: Annotated[
        Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None,
        BeforeValidator(_named_paths),
        Metavar("NAME=PATH"),
    ] = Field(
        default=None,
        description="PyTorch engine: LoRA adapters, which clients name in place of the model; a "
        "PATH alone is called default",
    )
    speculative_algorithm: (
        Literal["eagle", "eagle3", "deepseek_mtp", "hy3_mtp", "qwen3_5_mtp", "dflash"] | None
    ) = Field(default=None, description="PyTorch engine: how a draft proposes tokens")
    speculative_draft_model: Annotated[str | None, Metavar("PATH")] = Field(
        default=None, description="PyTorch engine: the draft, a folder or a hub id in the cache"
    )
    speculative_num_draft_tokens: Positive | None = Field(
        default=None, description="PyTorch engine: tokens that a draft proposes (default: 1)"
    )

    def with_maximum(self, tokens: int) -> PlanRequest:
        """Return the request in which the model's longest context replaces ``max``."""
        names = [name for name in ("context", "session_len") if getattr(self, name) == "max"]
        return self.changed(**dict.fromkeys(names, tokens)) if names else self

    @property
    def workload(self) -> Workload:
        """The workload that a plan promises to serve."""
        return Workload(
            images=self.images,
            image_size=self.image_size,
            context=None if self.context == "max" else self.context,
            concurrency=self.concurrency,
            goal=self.goal,
            queue_images=self.queue_images,
            prompt_tokens=self.prompt_tokens or PROMPT_TOKENS,
            output_tokens=self.output_tokens or OUTPUT_TOKENS,
        )

    @property
    def margins(self) -> Margin:
        """The margin to keep free on each GPU."""
        if isinstance(self.margin, str):
            return Margin(share=float(self.margin[:-1]) / 100)
        return Margin(bytes=self.margin)

    @property
    def engine_options(self) -> dict[str, object]:
        """The given options of LMDeploy, by LMDeploy's names."""
        values = ((name, getattr(self, name)) for name in ENGINE_OPTIONS)
        return {name: value for name, value in values if value is not None}

    @property
    def options(self) -> dict[str, object]:
        """The given options as JSON, without the model and the machine."""
        fields = PlanRequest.model_fields
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.given().items()
            if name in fields and name not in _OF_A_PLACE
        }


_NAMES: Final = tuple(PlanRequest.model_fields)
#: The fields that are LMDeploy's own options; a plan never changes given options.
ENGINE_OPTIONS: Final = _NAMES[_NAMES.index("cache_max_entry_count") :]


class PredictRequest(PlanRequest, defer_build=True):  # built when it is first used
    """The request of a prediction: settings that are not given have LMDeploy's defaults."""

    free_at_cache: Bytes | None = Field(
        default=None,
        description="free memory when the cache is sized, as a log reports; replaces the forecast",
    )


class WhichRequest(PlanRequest, defer_build=True):
    """The request of `turbofit which`, which looks for machines or models."""

    images_per_second: Annotated[float | None, Field(gt=0), Metavar("RATE")] = Field(
        default=None,
        description="images a second that the forecast of speed must reach, over all requests",
    )
