"""Makes LMDeploy's own loader and engine run on the pretend machine of this process.

A CUDA build of torch runs on the pretend machine itself, so that LMDeploy and torch load as usual,
and only marks are added. CPU torch needs answers about the machine and a model of what loading
stages on the first card.
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
    staging: bool = True,
    tokenizer: bool = False,
    ready: Callable[[Any, int | None], None] = lambda _engine, _staged: None,
) -> None:
    """Marks the phases of a start, after what CPU torch needs.

    Args:
        scenario: the pretend machine.
        account: its account.
        first_device: the card on which loading stages tensors.
        staging: charge that card with them, where torch cannot do it itself.
        tokenizer: keep the model's tokenizer (a server needs it, a driver of token ids does not).
        ready: called with the TurboMind object, and the staging's peak in bytes, after its start.
    """
    import torch

    real = torch.version.cuda is not None
    stage = None if real else _patch_cpu_torch(scenario, account, first_device, staging)
    from lmdeploy.turbomind import turbomind
    from lmdeploy.turbomind.model_loader import ModelLoader

    from turbofit.rehearse.turbomind import shims
    from turbofit.rehearse.turbomind.hfconfig import plain_gpt_oss_tokenizer, register_internvl

    shims.patch_lmdeploy(tokenizer=tokenizer, headers=not real)
    register_internvl()
    plain_gpt_oss_tokenizer()
    engine: Any = turbomind.TurboMind
    loader: Any = ModelLoader
    for method, phase in (
        ("_create_weight", "context"),
        ("_process_weights", "prepare"),
        ("_create_engine", "engine"),
    ):
        setattr(engine, method, _marked(getattr(engine, method), phase, account))
    export, start = loader.export, engine.__init__

    def exported(self: Any) -> Any:
        account.mark("weights")
        with stage.mode if stage else contextlib.nullcontext():
            return export(self)

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        account.mark("ready")
        torch_peak = torch.cuda.max_memory_reserved(first_device) if real else None
        ready(self, stage.peak if stage else torch_peak)

    loader.export = exported
    engine.__init__ = started


def _patch_cpu_torch(
    scenario: Scenario, account: LibraryAccount, first_device: int, staging: bool
) -> Any:
    """The machine's answers; returns the account of staging, if it is wanted."""
    from turbofit.rehearse.turbomind import shims
    from turbofit.rehearse.turbomind.staging import Staging

    shims.declare_torchvision()
    stage: Any = Staging(account, first_device) if staging else None
    shims.patch_torch(scenario, stage.empty_cache if stage else lambda: None)
    return stage


def _marked(function: Any, phase: str, account: LibraryAccount) -> Any:
    def call(*args: Any) -> Any:
        account.mark(phase)
        return function(*args)

    return call
