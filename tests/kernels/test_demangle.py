from turbofit.kernels.families import demangle


def test_a_mangled_name() -> None:
    assert demangle("_ZN9turbomind15MoeGatherKernelEv") == "turbomind::MoeGatherKernel()"


def test_another_name_stays() -> None:
    assert demangle("main") == "main"
