"""Makes LMDeploy's own loader and engine run on the pretend machine of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from turbofit.pretend.library import Account
from turbofit.pretend.scenario import Scenario


def install(
    scenario: Scenario,
    account: Account,
    *,
    first_device: int = 0,
    staging: bool = True,
    tokenizer: bool = False,
    ready: Callable[[Any, int | None], None] = lambda _engine, _staged: None,
) -> None:
    """Patches torch and LMDeploy in this process, and marks the phases of a start.

    Args:
        scenario: the pretend machine.
        account: its account.
        first_device: the card on which loading stages tensors.
        staging: charge that card with them.
        tokenizer: keep the model's tokenizer (a server needs it, a driver of token ids does not).
        ready: called with the TurboMind object, and the staging's peak in bytes, after its start.
    """
    from turbofit.rehearse import shims
    from turbofit.rehearse.staging import Staging

    shims.declare_torchvision()
    stage: Any = Staging(account, first_device) if staging else None
    shims.patch_torch(scenario, stage.empty_cache if stage else lambda: None)
    from lmdeploy.turbomind import turbomind
    from lmdeploy.turbomind.model_loader import ModelLoader

    from turbofit.rehearse.hfconfig import register_internvl

    shims.patch_lmdeploy(tokenizer=tokenizer)
    register_internvl()
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
        ready(self, stage.peak if stage else None)

    loader.export = exported
    engine.__init__ = started


def _marked(function: Any, phase: str, account: Account) -> Any:
    def call(*args: Any) -> Any:
        account.mark(phase)
        return function(*args)

    return call
