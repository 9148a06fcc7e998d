"""Hugging Face Transformers behind turbofit's server, as planning asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from turbofit.core.errors import UsageError
from turbofit.core.images import ImageRule
from turbofit.core.messages import option_of
from turbofit.core.model import Model
from turbofit.core.plan import EngineName, HostMemory, Settings
from turbofit.core.units import GIB
from turbofit.memory.account import Account
from turbofit.memory.engine import Engine, WeightTraffic
from turbofit.memory.launch import EngineLaunch
from turbofit.memory.vision_load import VisionLoad

__all__ = ["Transformers"]

#: The release that the account was compared with; any 5.x is launched that has the same private
#: classes.
_RELEASE: Final = "5.17"
#: Host bytes of one server: torch, its CUDA libraries, Transformers. An estimate, over: 1 GB was
#: seen on a CPU (without CUDA's libraries).
_HOST_PROCESS: Final = 4 * GIB
#: Options of LMDeploy's that mean something here.
_OPTIONS: Final = frozenset({"dtype", "session_len", "max_batch_size", "tp"})


class Transformers(Engine):
    """What runs a model that LMDeploy does not, one request at a time."""

    name: ClassVar[EngineName] = "transformers"

    def __init__(self) -> None:
        super().__init__(_RELEASE)

    def defaults(self, gpu_name: str) -> dict[str, object]:  # noqa: ARG002 - alike on all cards
        """See :meth:`Engine.defaults`."""
        return {"max_batch_size": 1}

    def check_options(self, fixed: Mapping[str, object]) -> None:
        """See :meth:`Engine.check_options`."""
        for name in sorted(set(fixed) - _OPTIONS):
            raise UsageError(
                f"{option_of(name)} is LMDeploy's, and the fallback engine has no such option",
                hint="leave it out; --dtype and --session-len are heard",
            )
        if fixed.get("max_batch_size", 1) != 1:
            raise UsageError(
                "the fallback engine serves one request at a time: --max-batch-size is 1",
                hint="--replicas N serves N at a time, each on GPUs of its own",
            )

    def account(self, launch: EngineLaunch) -> Account:
        """See :meth:`Engine.account`."""
        from turbofit.memory.transformers.transformers_account import TransformersAccount

        return TransformersAccount(launch)

    def tp_problem(self, model: Model, tp: int) -> str | None:
        """See :meth:`Engine.tp_problem`."""
        return None if tp == 1 else f"Transformers splits {model.name} by layers alone"

    def problem(self, launch: EngineLaunch) -> str | None:
        """See :meth:`Engine.problem`."""
        return self.tp_problem(launch.model, launch.settings.tp)

    def units_bound(self, rule: ImageRule, vision_load: VisionLoad, settings: Settings) -> int:  # noqa: ARG002
        """One request's: nothing comes together."""
        return vision_load.units_per_request

    def block_bytes(self, model: Model, settings: Settings) -> int:
        """One token's, over all GPUs."""
        from turbofit.memory.transformers.components import components

        return sum(layer.kv_per_token for layer in components(model, settings.dtype).layers)

    def traffic(self, model: Model, tp: int) -> WeightTraffic:  # noqa: ARG002 - layers take turns
        """See :meth:`Engine.traffic`."""
        from turbofit.memory.transformers.components import components

        parts = components(model, model.dtype)
        decode = parts.weights - parts.vision - (0 if parts.tied else parts.embeddings)
        return WeightTraffic(decode=decode, vision=parts.vision)

    def host_memory(
        self,
        model: Model,  # noqa: ARG002
        settings: Settings,  # noqa: ARG002
        *,
        units_per_forward: int,  # noqa: ARG002
    ) -> HostMemory:
        """Of one copy whose layers are all on GPUs."""
        return HostMemory(pinned=0, pageable=_HOST_PROCESS, available=None)

    def prefill_words(self, settings: Settings) -> str:  # noqa: ARG002
        """See :meth:`Engine.prefill_words`."""
        return "a whole prompt is one forward"

    def communicator(self, settings: Settings) -> str:  # noqa: ARG002
        """See :meth:`Engine.communicator`."""
        return "none"
