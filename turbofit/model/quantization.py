"""Reads how a checkpoint is quantised; `families.engines` says which engines can run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.model import Quantization
from turbofit.core.version import REFERENCE
from turbofit.model.config import Section

#: Group sizes that at least one engine of LMDeploy can run.
_GROUPS: Final = {"awq": {32, 64, 128}, "gptq": {128}, "compressed-tensors": {32, 128}}
_METHODS: Final = (*_GROUPS, "fp8", "mxfp4")
_BLOCK: Final = (128, 128)
_DEEPEST: Final = 8
#: compressed-tensors' strategy, if a file only has the group size.
_STRATEGIES: Final = {None: "tensor", -1: "channel"}
_OF_GROUPS: Final = ("group", "tensor_group")
_OTHERS: Final = "take a checkpoint with AWQ (gemm) or GPTQ in groups of 128, or an unquantised one"


def read_quantization(config: Section) -> Quantization | None:
    """Read the ``quantization_config``, anywhere in config.json; None if there is none.

    Methods that no engine runs, or that have no account, are refused.

    Raises:
        UsageError: LMDeploy does not read such weights, or there is no account of them.
    """
    values = _find(config.values, _DEEPEST)
    if not values:
        return None
    section = Section(values, f"{config.what}: quantization_config")
    method, version = section.string("quant_method", ""), section.string("version", "")
    if method == "smooth_quant":
        raise _without_account(section, "smooth_quant (W8A8)")
    _refuse(
        section,
        {
            "weights whose quantization_config has no quant_method": not method,
            f"the quantisation {method[:40]!r}": method not in _METHODS,
            f"an AWQ version other than gemm, here {version[:40]!r}":
                method == "awq" and version.lower() not in ("", "gemm"),
            "GPTQ with desc_act": method == "gptq" and section.boolean("desc_act", False),
            "GPTQ without sym": method == "gptq" and not section.boolean("sym", True),
        },
    )  # fmt: skip
    if method == "awq" and version != "gemm":
        raise UsageError(
            f"{section.what}: LMDeploy {REFERENCE}'s TurboMind does not start from AWQ whose"
            f" version is {version!r} instead of 'gemm'",
            hint='write "version": "gemm" into it where the weights are packed so, as AutoAWQ'
            " packs them by default",
        )
    if method == "awq":
        return _checked(section, "awq", section.integer("bits", section.integer("w_bit", 4)))
    if method == "gptq":
        quantization = _checked(section, "gptq", section.integer("bits", 4))
        return replace(quantization, unconverted=(*quantization.unconverted, *_left_out(section)))
    if method == "compressed-tensors":
        return _compressed(section)
    if method == "fp8":
        return _fp8(section)
    skipped = section.strings("modules_to_not_convert")
    return Quantization(method="mxfp4", bits=4, group_size=32, unconverted=skipped)


def _left_out(section: Section) -> list[str]:
    """The modules that GPTQModel's ``dynamic`` leaves unquantised; its other rules are refused."""
    rules = section.part("dynamic").values
    several = any(isinstance(rule, dict) and rule for rule in rules.values())
    _refuse(section, {"GPTQ with several ways of packing (dynamic)": several})
    return [f"re:{name[2:]}" for name in rules if name.startswith("-:")]


def _fp8(section: Section) -> Quantization:
    block = section.integers("weight_block_size")
    if not block and section.string("activation_scheme", "") == "static":
        raise _without_account(section, "fp8 with one static scale a tensor")
    here = f"blocks of {' x '.join(map(str, block))}" if block else "no blocks"
    _refuse(
        section, {f"fp8 without scales for blocks of 128 x 128: it has {here}": block != _BLOCK}
    )
    skipped = section.strings("modules_to_not_convert")
    return Quantization(method="fp8", bits=8, group_size=128, unconverted=skipped)


def _compressed(section: Section) -> Quantization:
    groups = section.part("config_groups")
    group = groups.part("group_0")
    weights = group.part("weights")
    stored = group.string("format", section.string("format", ""))
    kind, bits = weights.string("type", "int"), weights.integer("num_bits", 4)
    size = weights.values.get("group_size")
    if size not in (None, -1):
        size = weights.integer("group_size")
    strategy = weights.string("strategy", "") or _STRATEGIES.get(size, "group")
    weights.refuse_if(
        (strategy in _OF_GROUPS) == (size in _STRATEGIES),
        "group_size",
        f"is {size!r} with the strategy {strategy[:20]!r}",
    )
    _refuse(
        section,
        {
            "compressed-tensors without weights in config_groups.group_0": not weights.values,
            f"compressed-tensors as {stored[:40]!r} of type {kind[:20]!r}":
                stored != "pack-quantized" or kind != "int",
            f"compressed-tensors with {len(groups.values)} groups of layers":
                len(groups.values) > 1,
            f"compressed-tensors with {bits} bits and one scale a {strategy[:20]}":
                strategy not in _OF_GROUPS,
        },
    )  # fmt: skip
    quantization = _checked(weights, "compressed-tensors", bits, section)
    if not quantization.of_experts and not group.string("format", ""):
        # LMDeploy raises KeyError 'format'; checkpoints of experts only go to the PyTorch engine
        # instead. Source: lmdeploy turbomind/converter.py::get_tm_config #7c931e
        raise UsageError(
            f"{section.what}: LMDeploy {REFERENCE} does not start from config_groups without a"
            " format",
            hint=f'add "format": "{stored}" to its group_0 in config.json',
        )
    return replace(quantization, asymmetric=not weights.boolean("symmetric", True))


def _checked(
    section: Section,
    method: Literal["awq", "gptq", "compressed-tensors"],
    bits: int,
    outer: Section | None = None,
) -> Quantization:
    """Read bits and group size; only 4 bits and known groups pass; ``outer`` has exempt layers."""
    outer = outer or section
    group = section.integer("group_size", section.integer("q_group_size", 128, low=-1), low=-1)
    packed = f"{method} with {bits} bits"
    _refuse(
        outer,
        {
            f"{packed} and one scale a channel": group == -1,
            f"{packed} in groups of {group}": bits != 4 or group not in _GROUPS[method],
        },
    )
    skipped = "ignore" if method == "compressed-tensors" else "modules_to_not_convert"
    return Quantization(
        method=method, bits=bits, group_size=group, unconverted=outer.strings(skipped)
    )


def _refuse(section: Section, reasons: Mapping[str, bool]) -> None:
    """Refuse the weights for the first of the reasons that is true."""
    if what := next((what for what, is_so in reasons.items() if is_so), None):
        raise UsageError(f"{section.what}: LMDeploy {REFERENCE} does not run {what}", hint=_OTHERS)


def _without_account(section: Section, what: str) -> UsageError:
    return UsageError(
        f"{section.what}: LMDeploy {REFERENCE}'s PyTorch engine runs {what}, and turbofit has"
        " no account of it",
        hint=_OTHERS,
    )


def _find(values: dict[str, Any], depth: int) -> dict[str, Any] | None:
    """The first ``quantization_config`` in the config or in its nested objects."""
    section = values.get("quantization_config")
    if isinstance(section, dict):
        return section
    if depth:
        for value in values.values():
            if isinstance(value, dict) and (inner := _find(value, depth - 1)):
                return inner
    return None
