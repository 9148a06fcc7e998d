"""The symbols of a library, and the short names of its functions."""

from __future__ import annotations

from turbofit.machine.kernels.families import demangle
from turbofit.rehearsal.pretend.elf import short_name


def test_names_are_short() -> None:
    name = demangle("_ZN9turbomind9InternVit4Impl7ForwardEiRNS_4core9TensorMapE")
    assert name.startswith("turbomind::InternVit::Impl::Forward(")
    assert short_name(name) == "InternVit::Impl::Forward"
    assert short_name("void turbomind::gemm::Tune<int, A<B> >(int (*)(long)) const") == "gemm::Tune"
    assert demangle("cudaMalloc") == "cudaMalloc"
