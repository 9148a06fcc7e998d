"""Seconds of one forward of the language model: products, attention, links, launches."""

from __future__ import annotations

from turbofit.core.struct import Struct
from turbofit.tuner.speed.all_reduce import AllReduce
from turbofit.tuner.speed.rates import GpuRates, Rates
from turbofit.tuner.speed.work import StepWork

__all__ = ["ForwardPass", "forward_pass_of"]


class ForwardPass(Struct):
    """What the forwards of one engine share.

    ``launches`` are seconds that no batch shortens, ``reduce_launches`` those of all-reduces;
    ``token_reduces`` are seconds of one token on links.
    """

    work: StepWork
    card: GpuRates
    launches: float
    reduce_launches: float
    token_reduces: float

    def seconds(self, tokens: float, *, pairs: float = 0.0, cached: float = 0.0) -> float:
        """One forward.

        A product reads its weights while it computes, and the slower of both counts: few rows are
        bound by memory, many by FLOPs. Attention runs between products and hides behind neither.

        Args:
            tokens: that run through the layers.
            pairs: of a token and one that it looks at, where a prompt is computed.
            cached: tokens whose keys and values are read.
        """
        work, card = self.work, self.card
        products = max(
            work.read_bytes(tokens) / card.bandwidth, tokens * work.token_flops / card.flops
        )
        attention = pairs * work.pair_flops / card.flops + cached * work.kv_bytes / card.bandwidth
        return products + attention + self.reduces(tokens) + self.launches

    def reduces(self, tokens: float) -> float:
        """Seconds that a forward of so many tokens spends on links."""
        return self.reduce_launches + tokens * self.token_reduces


def forward_pass_of(
    work: StepWork, card: GpuRates, reduce: AllReduce, figures: Rates
) -> ForwardPass:
    """The forward of one engine on one group."""
    reduces = 2 * work.layers
    return ForwardPass(
        work=work,
        card=card,
        launches=work.layers * figures.layer_seconds + figures.step_seconds,
        reduce_launches=reduces * reduce.launch,
        token_reduces=reduces * reduce.seconds_per_byte * work.hidden_bytes,
    )
