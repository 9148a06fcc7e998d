"""Python runs this in every process of a server of LMDeploy's PyTorch engine on pretend GPUs.

Each process reads the stand-in checkpoint anew, and so needs what its family brings.
"""

import importlib
import sys
from typing import Any

#: Of the pretend machine, whose folder is on every process's path.
_AFTER: Any = importlib.import_module("turbofit_imports").After


def _config_classes(_: Any) -> None:
    from turbofit.rehearse.turbomind import hfconfig

    hfconfig.register_internvl(whole=True)
    hfconfig.register_intern_s1_pro()


def _tokenizer(_: Any) -> None:
    from turbofit.rehearse.turbomind import hfconfig

    hfconfig.plain_gpt_oss_tokenizer()


def _parser(_: Any) -> None:
    from turbofit.rehearse.turbomind import hfconfig

    hfconfig.plain_gpt_oss_parser()


for _name, _act in (
    ("lmdeploy.hf_configs", _config_classes),
    ("lmdeploy.tokenizer", _tokenizer),
    ("lmdeploy.serve.parsers", _parser),
):
    sys.meta_path.insert(0, _AFTER(_name, _act))
