"""Python imports this file in each process of an engine on torch, on pretend GPUs.

In a rehearsal the file starts `phase_recorder`. In a PyTorch engine's server some functions of
LMDeploy do not work with a stand-in checkpoint. When a process imports the module of such a
function, this file replaces the function. Every process reads the checkpoint, so every process
needs this file.
"""

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

#: The module is in a folder that is on the path of every process of a pretend machine.
_AFTER: Any = importlib.import_module("turbofit_imports").After


def _stand_in(module: Any) -> None:
    """Replace the functions of an LMDeploy module that this process has just imported."""
    from turbofit.rehearsal.no_answer import say_no_answer
    from turbofit.rehearsal.turbomind import hfconfig

    acts: dict[str, Callable[[], None]] = {
        "lmdeploy.hf_configs": hfconfig.register_for_pytorch,
        "lmdeploy.tokenizer": hfconfig.plain_gpt_oss_tokenizer,
        "lmdeploy.serve.parsers": hfconfig.plain_gpt_oss_parser,
        "lmdeploy.vl.model.llava_hf": hfconfig.infer_channels_of_llava,
        "lmdeploy.serve.core.async_engine": partial(say_no_answer, module),
    }
    acts[module.__name__]()


if os.environ.get("TURBOFIT_REHEARSAL"):
    from turbofit.rehearsal.torch.phase_recorder import start

    start(os.environ["TURBOFIT_REHEARSAL"])
else:
    for _name in (
        "lmdeploy.hf_configs", "lmdeploy.tokenizer", "lmdeploy.serve.parsers",
        "lmdeploy.vl.model.llava_hf", "lmdeploy.serve.core.async_engine",
    ):  # fmt: skip
        sys.meta_path.insert(0, _AFTER(_name, _stand_in))
