"""Older engines of LMDeploy, as planning asks them: for `predict` and `bench/accuracy`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from turbofit.core.errors import UsageError
from turbofit.core.images import ImageRule
from turbofit.core.model import Model
from turbofit.core.plan import HostMemory, Settings
from turbofit.kernels.census import Census
from turbofit.memory.account import Account
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.legacy.generations import (
    Generation,
    KvHeads,
    generation_of,
    torch_generation_of,
)
from turbofit.memory.legacy.legacy_account import legacy_account
from turbofit.memory.legacy.pytorch import LegacyTorchAccount
from turbofit.memory.pytorch.account import Pytorch
from turbofit.memory.turbomind.account import Turbomind
from turbofit.memory.turbomind.constants import load_constants
from turbofit.memory.versions import FIRST_CURRENT, REFERENCE
from turbofit.memory.vision_load import VisionLoad

__all__ = ["LegacyPytorch", "LegacyTurbomind"]

_RATIO = 0.8
_INT8 = 8


def _undealt(kv_heads: int, tp: int, rule: KvHeads) -> str | None:
    """Why a rule does not deal KV heads to ranks; None where it does, or 0.18's is the same."""
    if rule == "any" or kv_heads % tp == 0:
        return None
    if rule == "multiples":
        if tp % kv_heads == 0:
            return None
        return f"repeats {kv_heads} KV heads only over a multiple of them, not over {tp} ranks"
    ends = "a floating point exception" if rule == "divided" else "an assertion"
    return (
        f"repeats no KV heads, as 0.6.5 and newer do: with {kv_heads} of them over {tp} ranks it"
        f" ends in {ends}"
    )


class LegacyTurbomind(Turbomind):
    """TurboMind before 0.18.

    Args:
        version: LMDeploy's, e.g. ``0.6.3``.

    Raises:
        PackageError: not a version before 0.18.
    """

    def __init__(self, version: str) -> None:
        super().__init__(FIRST_CURRENT)
        self.version = version
        self.generation: Generation = generation_of(version)

    def defaults(self, gpu_name: str) -> dict[str, object]:
        """See :meth:`Engine.defaults`."""
        rules = self.generation
        return {
            "cache_max_entry_count": rules.cache.default,
            "max_batch_size": rules.batch_size(gpu_name),
            "max_prefill_token_num": rules.prefill,
            "cache_block_seq_len": rules.cache.block_tokens,
        }

    def account(self, launch: EngineLaunch) -> Account:
        """See :meth:`Engine.account`."""
        return legacy_account(launch, self.constants, self.generation)

    def tp_problem(self, model: Model, tp: int) -> str | None:
        """What its loaders could not divide; a tower under torch is not divided."""
        if self.generation.vision.runs != "native":
            model = replace(model, vision=None)
        return next(self._tp_problems(model, tp), None) or super().tp_problem(model, tp)

    def _tp_problems(self, model: Model, tp: int) -> Iterator[str]:
        rules, text = self.generation, model.text
        if rules.power_of_two and tp & (tp - 1):
            yield f"LMDeploy {self.version} takes powers of two"
        problem = _undealt(text.kv_heads, tp, rules.kv_heads)
        if problem:
            yield f"LMDeploy {self.version} {problem}"
        group = model.quantization.group_size if model.quantization else 1
        if rules.ffn_align is None and text.intermediate // group % tp:
            yield f"the MLP's {text.intermediate} channels do not divide by {tp}"

    def problem(self, launch: EngineLaunch) -> str | None:
        """Counts of blocks were allowed where the cache is not one region of pages."""
        settings, bits = launch.settings, self.generation.cache.bits
        if settings.quant_policy == _INT8 and _INT8 not in bits:
            four = next(policy for policy, size in bits.items() if size == _INT8)
            return (
                f"--quant-policy {_INT8} is none of LMDeploy {self.version}, whose cache in 8 bits"
                f" is {four}"
            )
        if settings.cache_max_entry_count >= 1 and not self.generation.cache.objects:
            settings = replace(settings, cache_max_entry_count=_RATIO)
        return super().problem(replace(launch, settings=settings))

    def known_census(self, launch: EngineLaunch) -> Census | None:  # noqa: ARG002
        """That of its release: what is installed here is asked for another version."""
        return self.released_census()

    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
        """A tower under torch runs one image at a time."""
        if self.generation.vision.runs == "native":
            return super().units_bound(rule, vision_load, settings)
        return vision_load.units_per_image

    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """0.18's, and the pinned pixels of two whole forwards a rank where they were pinned."""
        made = super().host_memory(model, settings, units_per_forward=units_per_forward)
        # Pixels are set aside for tiles alone; a patch is one token of the tower.
        if not self.generation.vision.pinned_pixels or model.unit_tower_tokens == 1:
            return made
        tokens = settings.max_prefill_token_num + settings.max_batch_size
        each = 2 * model.pixel_bytes(tokens)
        return replace(made, pinned=made.pinned + each * settings.tp)

    def prefill_words(self, settings: Settings) -> str:  # noqa: ARG002
        """See :meth:`Engine.prefill_words`."""
        return f"as LMDeploy {self.version} takes it"


class LegacyPytorch(Pytorch):
    """The PyTorch engine before 0.18.

    Args:
        version: LMDeploy's, e.g. ``0.6.3``.

    Raises:
        PackageError: not a version before 0.18.
    """

    def __init__(self, version: str) -> None:
        super().__init__(FIRST_CURRENT)
        self.version = version
        self.generation = torch_generation_of(version)
        self._turbomind = load_constants(FIRST_CURRENT)

    def defaults(self, gpu_name: str) -> dict[str, object]:
        """See :meth:`Engine.defaults`."""
        rules = self.generation
        return {
            "cache_max_entry_count": _RATIO,
            "max_batch_size": rules.batch_size(gpu_name),
            "max_prefill_token_num": rules.prefill,
            "cache_block_seq_len": rules.block_tokens,
        }

    def tp_problem(self, model: Model, tp: int) -> str | None:
        """See :meth:`Engine.tp_problem`."""
        problem = _undealt(model.text.kv_heads, tp, self.generation.kv_heads)
        if problem:
            return f"LMDeploy {self.version} {problem}"
        return super().tp_problem(model, tp)

    def check_options(self, fixed: Mapping[str, object]) -> None:
        """See :meth:`Engine.check_options`."""
        if "speculative" in fixed:
            raise UsageError(
                f"turbofit has no account of speculative decoding with LMDeploy {self.version}",
                hint=f"it has one for LMDeploy {REFERENCE}",
            )

    def account(self, launch: EngineLaunch) -> Account:
        """See :meth:`Engine.account`."""
        return LegacyTorchAccount(launch, self._turbomind, self.generation)
