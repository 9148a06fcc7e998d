"""The account of LMDeploy's PyTorch engine before 0.18.

The engine loads the weights, then sets aside a reserve for one forward. A ratio of the remaining
free memory becomes the cache. The engine allocates nothing else in advance: torch's allocator keeps
the memory of forwards. A ledger's ``steady`` bytes are those of a server that has answered one
image at the image's default limit.
"""

from __future__ import annotations

from collections.abc import Iterator

from turbofit.core.messages import counted
from turbofit.core.model import Model
from turbofit.core.plan import Term
from turbofit.core.units import HALF, round_up
from turbofit.machine.presets import context_bytes
from turbofit.memory.account import (
    PAGE,
    POOL_WARMUP,
    Account,
    CacheShape,
    EngineLaunch,
    StaticMemory,
    batch_size,
    term,
    transients,
)  # fmt: skip
from turbofit.memory.legacy.generations import (
    TorchGeneration,
    torch_generation_of,
    tower_activations,
    tower_bytes,
)
from turbofit.memory.legacy.turbomind import PROMPT, GroupAccount
from turbofit.memory.pytorch.account import Pytorch
from turbofit.memory.pytorch.activations import routed_elements
from turbofit.memory.pytorch.cache import block_bytes
from turbofit.memory.turbomind.account import before_terms
from turbofit.memory.turbomind.weights import EngineConstants, kv_heads_held, load_constants
from turbofit.memory.versions import FIRST_CURRENT
from turbofit.model.parameters import stored_bytes


class LegacyTorchAccount(GroupAccount):
    """The account of one model with given settings on one group of GPUs.

    ``constants`` are those of 0.18, for figures that are equal in all generations (contexts, NCCL).
    """

    #: With fewer blocks the engine raises "No enough gpu memory for kv cache".
    least_blocks = 3

    def __init__(
        self, launch: EngineLaunch, constants: EngineConstants, generation: TorchGeneration
    ) -> None:
        model, vision_load = launch.model, launch.vision_load
        self.generation, self.constants, self.settings = generation, constants, launch.settings
        self._model, self._vision_load = model, vision_load
        size, tokens = block_bytes(model.text, self.settings), self.settings.cache_block_seq_len
        self.shape = CacheShape(block_bytes=size, block_tokens=tokens, step=PAGE)
        units = vision_load.units_per_image if model.vision is not None else 0
        if generation.tower == "engine":  # all images of a request meet in one forward
            units *= vision_load.images_per_request
        static = [
            StaticMemory(before=tuple(self._terms_before(i, launch)), buffers=())
            for i in range(len(launch.gpus))
        ]
        super().__init__(launch, static, self._first(), self._cases(units), units)

    @property
    def runtime(self) -> int:
        """Bytes reserved for one forward; the prefill is halved until 16 blocks fit."""
        rule, settings = self.generation.runtime, self.settings
        rows = rule.batch_rows * settings.max_batch_size
        prefill = settings.max_prefill_token_num
        while prefill > 0:
            size = rule.bytes * (prefill + rows) * self._model.text.vocab
            left = (self.free - size) * settings.cache_max_entry_count
            if left // self.block_bytes >= 16:
                return size
            prefill //= 2
        return rule.bytes * rows * self._model.text.vocab

    @property
    def ratio_base(self) -> int:
        """Bytes of free memory minus the reserve for one forward."""
        return self.free - self.runtime

    def region_at(self, ratio: float) -> int:
        return int(max(0, self.ratio_base) * ratio) // self.block_bytes * self.block_bytes

    def _terms_before(self, i: int, launch: EngineLaunch) -> Iterator[Term]:
        """Yield the terms of contexts, of the language model and of the vision tower.

        Embedding and lm_head are whole on every rank; the rest of the language model is divided.
        """
        model, gpu, tp = launch.model, launch.gpus[i], launch.settings.tp
        text, spread = model.text, self.generation.tower == "front_end"
        yield from before_terms(launch, gpu, self.constants)
        if tp > 1:
            # Ranks are separate processes; the server's process has a context on each GPU, too. On
            # two T4 (0.7), both GPUs held the same. Over for GPUs that the server does not use.
            size, _ = context_bytes(gpu)
            note = "the server's process, in addition to the rank's"
            yield term("server_context", "context", size, "estimate", note)
        whole = text.vocab * text.hidden * HALF
        heads = whole if text.tie_word_embeddings else 2 * whole
        body = stored_bytes(text, None, "float16", model.quantization) - heads
        for name, size in (("embeddings", heads), ("layers", -(-body // tp))):
            yield term(f"weights.{name}", "weights", round_up(size, PAGE), "formula")
        # Each rank counts the whole tower: over for families that divide attention and MLP.
        size = tower_bytes(model, tp, spread=spread)[i if spread else 0]
        if size:
            note = f"part of the {self.generation.tower.replace('_', ' ')}"
            yield term("weights.vision_tower", "weights", size, "formula", note)

    def _forward(self, tokens: int, rows: int) -> int:
        """Return the bytes of torch's pool after a prefill of ``tokens`` tokens.

        ``rows`` is the number of sequences that sample a token.
        """
        text, tp = self._model.text, self.settings.tp
        heads = (text.heads + 2 * kv_heads_held(text.kv_heads, tp)) * text.head_dim // tp
        inner = self._mlp_elements() + 4 * text.hidden
        wide = max(heads + 4 * text.hidden, inner) * tokens * HALF
        rule = self.generation.logits
        logits = rule.bytes * text.vocab * (tokens if rule.tokens == "all" else rows)
        return wide + logits

    def _mlp_elements(self) -> int:
        """Return a token's tensor elements in the MLP, or in its experts if these have more.

        An MLP has gate, up and their product.
        """
        text, tp = self._model.text, self.settings.tp
        dense = 3 * text.intermediate // tp
        if text.moe is None:
            return dense
        moe = text.moe
        routed = routed_elements(moe, moe.intermediate // tp, text.hidden)
        return max(dense, routed, 3 * moe.shared_intermediate // tp)

    def _first(self) -> Term:
        """Return the term of the bytes that the first image leaves in torch's pool.

        The image is the largest that the checkpoint's own limit and the clients' limit admit.
        """
        rule, size, units = self._model.image_rule, 0, 0
        if rule is not None and self._vision_load.units_per_image and self._model.vision:
            units = min(rule.worst_units(), self._vision_load.units_per_image)
            tokens = rule.unit_tokens(units) + PROMPT
            size = self._forward(tokens, 1) + tower_activations(self._model, units, flash=True)
        note = f"the first image, {counted(units, 'unit')}"
        return term(POOL_WARMUP, "buffers", round_up(size, PAGE), "estimate", note)

    def _cases(self, units: int) -> tuple[Term, ...]:
        """Return the bytes of torch's pool in each worst case."""
        settings, vision_load = self.settings, self._vision_load
        text = self._forward(settings.max_prefill_token_num, settings.max_batch_size)
        cases = [("text_prefill", text, "longest prompts fill a forward")]
        if units:
            prompt = vision_load.tokens_per_request + PROMPT
            # In the front end, the checkpoint's code decides on flash attention. Attention without
            # flash attention is the upper end.
            flash = self.generation.tower == "engine"
            request = self._forward(prompt, 1) + tower_activations(self._model, units, flash=flash)
            cases.append(("vision_request", request, f"{counted(units, 'unit')}, one request"))
        return transients(
            [(name, round_up(size, PAGE), "estimate", note) for name, size, note in cases]
        )


class LegacyPytorch(Pytorch):
    """The PyTorch engine before 0.18."""

    def __init__(self, version: str) -> None:
        super().__init__(FIRST_CURRENT)
        self.version = version
        self.generation = torch_generation_of(version)
        self._turbomind = load_constants(FIRST_CURRENT)

    def defaults(self, gpu_name: str) -> dict[str, object]:
        rules = self.generation
        return {
            "cache_max_entry_count": rules.ratio,
            "max_batch_size": batch_size(rules.batch, gpu_name),
            "max_prefill_token_num": rules.prefill,
            "cache_block_seq_len": rules.block_tokens,
        }

    def tp_problem(self, model: Model, tp: int) -> str | None:
        problem = self.generation.kv_heads_problem(model.text.kv_heads, tp)
        if problem:
            return f"LMDeploy {self.version} {problem}"
        return super().tp_problem(model, tp)

    def account(self, launch: EngineLaunch) -> Account:
        return LegacyTorchAccount(launch, self._turbomind, self.generation)
