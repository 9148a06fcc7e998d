"""The PyTorch engine, as planning asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from turbofit.core.images import ImageRule
from turbofit.core.model import Model
from turbofit.core.plan import EngineName, HostMemory, Settings
from turbofit.memory.account import Account
from turbofit.memory.engine import Engine, WeightTraffic
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.pytorch.flash_attention import needed_modules
from turbofit.memory.vision_load import VisionLoad

__all__ = ["Pytorch"]


class Pytorch(Engine):
    """LMDeploy's engine in Python, on torch and Triton."""

    name: ClassVar[EngineName] = "pytorch"
    exclusive_options: ClassVar[tuple[str, ...]] = (
        "num_gpu_blocks", "eager_mode", "cudagraph_capture_batch_sizes",
        "distributed_executor_backend", "speculative",
    )  # fmt: skip
    exclusive_values: ClassVar[Mapping[str, frozenset[object]]] = {
        "quant_policy": frozenset({16, 17, 42})
    }
    options_over_nodes: ClassVar[Mapping[str, object]] = {"distributed_executor_backend": "ray"}

    def __init__(self, version: str) -> None:
        from turbofit.memory.pytorch.constants import load_constants

        super().__init__(version)
        self.constants = load_constants(version)

    def account(self, launch: EngineLaunch) -> Account:
        """See :meth:`Engine.account`."""
        from turbofit.memory.pytorch.account import PytorchAccount

        return PytorchAccount(launch, self.constants)

    def tp_problem(self, model: Model, tp: int) -> str | None:
        """See :meth:`Engine.tp_problem`."""
        from turbofit.memory.pytorch.constraints import tp_problem

        return tp_problem(model, tp)

    def problem(self, launch: EngineLaunch) -> str | None:
        """See :meth:`Engine.problem`."""
        from turbofit.memory.pytorch import constraints

        problem = constraints.settings_problem(launch.settings)
        problem = problem or constraints.checkpoint_problem(launch.model, launch.settings)
        problem = problem or constraints.cache_problem(launch.model, launch.settings)
        problem = problem or constraints.draft_problem(launch.settings)
        problem = problem or constraints.state_problem(launch)
        return problem or constraints.communicator_problem(launch.settings)

    def missing_kernels(self, launch: EngineLaunch) -> str | None:
        """See :meth:`Engine.missing_kernels`. Triton compiles all but what a card cannot do."""
        from turbofit.memory.pytorch.constraints import missing_kernels

        return missing_kernels(launch)

    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:
        """See :meth:`Engine.units_bound`."""
        from turbofit.memory.pytorch.bound import engine_bound

        return engine_bound(rule, vision_load, settings)

    def block_bytes(self, model: Model, settings: Settings) -> int:
        """See :meth:`Engine.block_bytes`."""
        from turbofit.memory.pytorch.cache import block_bytes

        return block_bytes(model.text, settings)

    def traffic(self, model: Model, tp: int) -> WeightTraffic:
        """See :meth:`Engine.traffic`."""
        from turbofit.memory.pytorch.weights import weight_classes

        classes = weight_classes(model, tp)
        for unread in ("audio", "forgotten"):
            classes.pop(unread, 0)
        vision = classes.pop("vision", 0) + classes.pop("vision.whole", 0)
        embedding = classes.pop("embedding")
        # A tied embedding is read as the head.
        head = 0 if "lm_head" in classes else embedding
        return WeightTraffic(decode=sum(classes.values()) + head, vision=vision)

    def host_memory(
        self, model: Model, settings: Settings, *, units_per_forward: int
    ) -> HostMemory:
        """See :meth:`Engine.host_memory`.

        Front end, engine and, with more than one rank, a worker each; pixels in 32 bits while they
        are preprocessed and in 16 in each process that they pass through.
        """
        pixels = model.pixel_bytes(units_per_forward)
        backend = settings.distributed_executor_backend or ("uni" if settings.tp == 1 else "ray")
        ranks = 0 if backend == "uni" else settings.tp
        each = (2 + ranks) * self.constants.host_process + pixels * (4 + ranks)
        return HostMemory(pinned=0, pageable=each, available=None)

    def warnings(self, settings: Settings) -> tuple[str, ...]:
        """See :meth:`Engine.warnings`."""
        said = [
            "torch keeps what it once reserved, so that nvidia-smi may show more than the peak, up"
            " to the whole card; it uses it again, but other processes do not get it"
        ]
        if settings.tp > 1 and settings.distributed_executor_backend in (None, "ray"):
            said.append(
                "its ranks run on Ray, which keeps objects in /dev/shm (up to 30 % of host RAM as"
                " it fills) and waits half an hour without a word where GPUs are taken"
            )
        if settings.draft is not None:
            modules = " and ".join(needed_modules(settings.draft.text))
            said.append(
                f"drafting needs {modules} beside LMDeploy,"
                " which does not start without; the forecast of speed is without a draft"
            )
        return tuple(said)

    def prefill_words(self, settings: Settings) -> str:  # noqa: ARG002
        """See :meth:`Engine.prefill_words`."""
        return "it bounds activations and the images that meet; LMDeploy never warms up with it"
