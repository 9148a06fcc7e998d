"""Writes the program that quantises a model by llm-compressor; its body is `program.txt`.

The program imports nothing of turbofit, so it runs where llm-compressor is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from turbofit.core.model import Model
from turbofit.core.struct import Struct
from turbofit.core.version import REFERENCE
from turbofit.model.quantize.needs import PICTURE_SIDE, Needs
from turbofit.model.quantize.scheme import Scheme, dtype_in_16_bits

#: The packages of the program, in one command so that pip keeps to LMDeploy's own versions: both
#: take torch 2.10 to 2.14 and Transformers 5.15 to 5.17.
INSTALL: Final = (
    f"pip install llmcompressor==0.14.0.1 compressed-tensors==0.19.0 lmdeploy=={REFERENCE}.0"
)
#: Data sets of the hub that llm-compressor's own examples take.
_TEXTS: Final = "HuggingFaceH4/ultrachat_200k:train_sft"
_PICTURES: Final = "lmms-lab/flickr30k:test"
#: Samples on which the program measures the loss, beside those that it calibrates with.
_HELD_OUT: Final = 16


class Request(Struct):
    """What a person asks of `turbofit quantize`.

    ``name`` is the checkpoint as it is given to the program. ``data`` is a file of conversations,
    or a data set of the hub; None is a usual one. ``samples`` and ``tokens`` are numbers; None:
    the most that fit.
    """

    name: str
    revision: str | None = None
    data: str | None = None
    samples: int | None = None
    tokens: int | None = None

    @property
    def folder(self) -> str:
        """The folder that the program makes."""
        return f"{Path(self.name).name}-w4a16"


def program_text(model: Model, scheme: Scheme, request: Request, needs: Needs) -> str:
    """Return the text of the program for a model."""
    usual = _TEXTS if model.vision is None else _PICTURES
    dtype = dtype_in_16_bits(model)
    values: dict[str, object] = {
        "MODEL": request.name,
        "REVISION": request.revision,
        "DTYPE": "auto" if dtype == model.dtype else dtype,
        "OUT": request.folder,
        "SAMPLES": request.data or usual,
        "COUNT": needs.samples,
        "LENGTH": needs.tokens,
        "HELD": _HELD_OUT,
        "SIDE": PICTURE_SIDE,
        "BITS": scheme.bits,
        "GROUP": scheme.group_size,
        "SYMMETRIC": scheme.symmetric,
        "IGNORE": list(scheme.ignore),
        "EXPERTS": model.text.moe is not None,
    }
    head, body = Path(__file__).with_name("program.txt").read_text(encoding="utf-8").split("@@\n")
    constants = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    return head + constants + body
