"""Options that several commands share, and what they become for `turbofit.api`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from turbofit.core.errors import UsageError
from turbofit.core.units import parse_bytes

if TYPE_CHECKING:
    from turbofit.cli.parser import Parser
    from turbofit.planning.request import PlanRequest

__all__ = [
    "LAST_PORT",
    "add_cluster",
    "add_json",
    "add_machine",
    "add_model",
    "add_planning",
    "add_settings",
    "number",
    "plan_request",
    "planning_keywords",
    "port",
    "size",
]

#: The last TCP port.
LAST_PORT: Final = 65535


def add_model(parser: Parser, *, optional: bool = False) -> None:
    """The model, and which revision of it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help="folder, hub id or a name `models` knows",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")


def add_machine(parser: Parser) -> None:
    """Which machine, and which of its GPUs."""
    parser.add_argument(
        "--on",
        metavar="SPEC",
        help="plan for this machine instead of the one here: 4xrtx3090, rtx3090+rtx4090, "
        "1xl4:free=19GiB, or a snapshot's path",
    )
    parser.add_argument(
        "--gpus",
        metavar="LIST",
        help="only these GPUs: PCI indices or UUIDs, inside CUDA_VISIBLE_DEVICES",
    )


def add_cluster(parser: Parser) -> None:
    """Several machines instead of one."""
    parser.add_argument(
        "--cluster",
        metavar="CLUSTER",
        help="plan for all machines of a cluster: ray, ray:ADDRESS, a cluster's file, or "
        "sim:4xrtx3090@100/8xh100@2, which simulates 100 machines and 2",
    )


def add_planning(parser: Parser) -> None:
    """Shape, workload, limits and budgets."""
    shape = parser.add_argument_group("shape")
    shape.add_argument("--tp", type=_positive, help="GPUs of one engine")
    shape.add_argument("--replicas", type=_positive, help="engines beside each other")
    shape.add_argument("--engine", choices=("auto", "turbomind", "pytorch", "transformers"))
    work = parser.add_argument_group("workload")
    work.add_argument("--images", type=_count, help="images a request (default 1)")
    work.add_argument(
        "--image-size", type=_image_size, metavar="WxH", help="their size (default: the worst)"
    )
    work.add_argument("--context", type=_positive, metavar="TOKENS", help="prompt and answer")
    work.add_argument("--concurrency", type=_positive, help="requests at once (default 8)")
    work.add_argument("--goal", choices=("throughput", "latency", "context"))
    work.add_argument(
        "--queue-images",
        action="store_true",
        default=None,
        help="image requests wait for each other in the gateway; the cache gets their memory",
    )
    limits = parser.add_argument_group("limits and budgets")
    limits.add_argument("--max-dynamic-patch", type=_positive, help="InternVL: tiles an image")
    limits.add_argument("--max-pixels", type=_positive, help="Qwen2-VL: pixels an image")
    limits.add_argument(
        "--margin",
        type=_margin,
        metavar="BYTES|%",
        help="left free on each GPU (default: the larger of 256MiB and 1%%)",
    )
    limits.add_argument(
        "--budget", type=size, metavar="BYTES", help="the most that turbofit may use of each GPU"
    )


def add_settings(parser: Parser) -> None:
    """LMDeploy's own options; what is set here is never changed."""
    group = parser.add_argument_group("LMDeploy settings to keep")
    add = group.add_argument
    add("--cache-max-entry-count", type=_ratio, metavar="RATIO")
    add("--max-prefill-token-num", type=_positive, metavar="TOKENS")
    add("--max-batch-size", type=_positive, metavar="N")
    add("--session-len", type=_positive, metavar="TOKENS")
    add("--communicator", choices=("nccl", "native", "cuda-ipc"))
    add("--dtype", choices=("auto", "float16", "bfloat16"))
    add("--quant-policy", type=_quant_policy, metavar="0|4|8")
    add("--cache-block-seq-len", type=_positive, metavar="TOKENS")
    add(
        "--model-format",
        choices=("hf", "awq", "gptq", "compressed-tensors", "fp8", "mxfp4"),
    )
    add("--enable-prefix-caching", action="store_true", default=None)
    add("--async", dest="async_", type=int, choices=(0, 1))
    add("--language-model-only", action="store_true", default=None)
    add("--eager-mode", action="store_true", default=None, help="PyTorch engine: no CUDA graphs")
    add("--num-gpu-blocks", type=_positive, metavar="N", help="PyTorch engine: instead of a ratio")
    add(
        "--cudagraph-capture-batch-sizes",
        type=_positive,
        nargs="+",
        metavar="N",
        help="PyTorch engine: batches that get a CUDA graph",
    )
    add(
        "--distributed-executor-backend",
        choices=("uni", "mp", "ray"),
        help="PyTorch engine: who runs its ranks",
    )


def add_json(parser: Parser) -> None:
    """The forms of the answer."""
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="one JSON document on stdout")
    forms.add_argument("--md", action="store_true", help="Markdown on stdout")


def planning_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `turbofit.api.plan` for what was given; defaults stay with the API."""
    from turbofit.planning.request import PlanRequest

    names = (name for name in PlanRequest.model_fields if name != "model")
    given = {name: getattr(args, name, None) for name in names}
    if given["dtype"] == "auto":  # LMDeploy's word for "choose"
        given["dtype"] = None
    return {name: value for name, value in given.items() if value is not None}


def plan_request(args: argparse.Namespace, keywords: dict[str, Any] | None = None) -> PlanRequest:
    """The request for a plan that the options make; ``keywords`` are `planning_keywords`."""
    from turbofit.planning.request import PlanRequest

    given = planning_keywords(args) if keywords is None else keywords
    return PlanRequest.of(model=args.model, **given)


def port(text: str) -> int:
    """A TCP port, for argparse."""
    value = _positive(text)
    if value > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return value


def number(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    return _positive(text)


def size(text: str) -> int:
    """A size in bytes, for argparse."""
    try:
        return parse_bytes(text)
    except UsageError as exc:
        raise argparse.ArgumentTypeError(exc.message) from None


def _margin(text: str) -> int | str:
    """Bytes, or a share of the card as ``3%``."""
    if not text.endswith("%"):
        return size(text)
    share = _number(text[:-1], float)
    if not 0 <= share < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of a card")
    return text


def _image_size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, e.g. 1920x1080")
    return _positive(parts[0]), _positive(parts[1])


def _ratio(text: str) -> float:
    value: float = _number(text, float)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not between 0 and 1, which LMDeploy demands since 0.15"
        )
    return value


def _quant_policy(text: str) -> int:
    names = {"0": 0, "none": 0, "4": 4, "int4": 4, "8": 8, "int8": 8, "16": 16, "17": 17}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of 0, 4 and 8 (none, int4, int8), or 16 and 17 (fp8, PyTorch"
            " engine)"
        )
    return names[text.lower()]


def _positive(text: str) -> int:
    value = _count(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not a positive number")
    return value


def _count(text: str) -> int:
    value: int = _number(text, int)
    if not 0 <= value <= 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range")
    return value


def _number(text: str, type_: type[int] | type[float]) -> Any:
    try:
        return type_(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
