"""Python modules that LMDeploy imports for some models alone, and ends without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from turbofit.memory.pytorch.activations import needed_modules

if TYPE_CHECKING:
    from turbofit.core.model import Model

__all__ = ["NeededModule", "modules_for"]


class NeededModule(NamedTuple):
    """``title`` is what people read, and its last word the module; ``mend`` installs it."""

    title: str
    mend: str

    @property
    def name(self) -> str:
        """What is imported."""
        return self.title.rpartition(" ")[2]


#: serve/openai/api_server.py takes no other parser for this architecture.
_ANSWERS: Final = {
    "GptOssForCausalLM": NeededModule("openai_harmony", "pip install openai_harmony")
}
#: Kernels of gated delta nets: pytorch/nn/gated_delta.py, pytorch/kernels/cuda/gated_delta_rule.py.
_DELTA: Final = {
    "pytorch": (
        NeededModule("flash-linear-attention's fla", "pip install flash-linear-attention"),
        NeededModule("tilelang", "pip install tilelang"),
    )
}
_DRAFT: Final = "build it from the sources of that name, or serve without --speculative-algorithm"


def modules_for(model: Model, engine: str, *, drafts: bool) -> Iterator[NeededModule]:
    """What an engine of LMDeploy imports for a model.

    Args:
        model: what is served.
        engine: by its name.
        drafts: whether tokens are drafted (speculative decoding).
    """
    if model.architecture in _ANSWERS:
        yield _ANSWERS[model.architecture]
    if model.text.delta is not None:
        yield from _DELTA.get(engine, ())
    if drafts:
        yield from (NeededModule(title, _DRAFT) for title in needed_modules(model.text))
