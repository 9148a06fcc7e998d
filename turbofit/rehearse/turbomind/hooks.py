"""Makes LMDeploy's own loader and engine run on the pretend machine of this process.

A CUDA build of torch runs on the pretend machine itself, so that LMDeploy and torch load as usual,
and only marks are added. What CPU torch lacks is in ``cpu_torch``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from turbofit.pretend.library import LibraryAccount
from turbofit.pretend.scenario import Scenario


def install(
    scenario: Scenario,
    account: LibraryAccount,
    *,
    first_device: int = 0,
    tokenizer: bool = False,
    ready: Callable[[Any], None] = lambda _engine: None,
) -> None:
    """Marks the phases of a start, after what CPU torch needs.

    Args:
        scenario: the pretend machine.
        account: its account.
        first_device: the card on which loading stages tensors.
        tokenizer: keep the model's tokenizer (a server needs it, a driver of token ids does not).
        ready: called with the TurboMind object after its start.
    """
    import torch

    staging: Any = None
    if torch.version.cuda is None:
        from turbofit.rehearse.turbomind import cpu_torch

        staging = cpu_torch.Staging(account, first_device)
        cpu_torch.patch_torch(scenario, staging)
    from lmdeploy.turbomind import turbomind
    from lmdeploy.turbomind.model_loader import ModelLoader
    from lmdeploy.turbomind.turbomind import _tm

    from turbofit.rehearse.turbomind.hfconfig import plain_gpt_oss_tokenizer, register_internvl

    register_internvl()
    plain_gpt_oss_tokenizer()
    module: Any = turbomind
    if not tokenizer:
        module.Tokenizer = _NoTokenizer
    engine: Any = module.TurboMind
    loader: Any = ModelLoader
    for method, phase in (
        ("_create_weight", "context"),
        ("_process_weights", "prepare"),
        ("_create_engine", "engine"),
    ):
        setattr(engine, method, _marked(getattr(engine, method), phase, account))
    export, start, copy_from = loader.export, engine.__init__, _tm.Tensor.copy_from

    def exported(self: Any) -> Any:
        account.mark("weights")
        with staging or contextlib.nullcontext():
            return export(self)

    def copy(self: Any, source: Any, *stream: Any) -> None:
        if not getattr(source, "is_meta", False):
            copy_from(self, source, *stream)

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        account.mark("ready")
        ready(self)

    loader.export, engine.__init__, _tm.Tensor.copy_from = exported, started, copy


def _marked(function: Any, phase: str, account: LibraryAccount) -> Any:
    def call(*args: Any) -> Any:
        account.mark(phase)
        return function(*args)

    return call


class _NoTokenizer:
    """In place of the model's tokenizer: a rehearsal gives token ids."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.model = None
        self.bos_token_id = self.eos_token_id = None
