import pytest

from turbofit.kernels.census import Count
from turbofit.kernels.families import experts, gemm
from turbofit.kernels.released import Version, is_released, released


def test_the_reference_has_no_int4_for_blackwell() -> None:
    """The figures of shared knowledge: 80 int4 kernels, all empty on sm_120, and none for rows."""
    census = released((0, 18, 0))
    assert census is not None
    names = [gemm("int4", "float16"), experts("int4", "float16")]
    assert census.count(names, "86") == Count(code=80)
    assert census.count(names, "120a") == Count(empty=80)
    assert census.count([experts("float16", "float16")], "90a") == Count()


@pytest.mark.parametrize("version", [(0, 6, 0), (0, 9, 1), (0, 12, 3)])
def test_no_release_before_0_13_has_code_for_blackwell(version: Version) -> None:
    census = released(version)
    assert census is not None
    assert census.architecture((12, 0)) is None
    assert census.architecture((8, 6)) == "86"


def test_releases_without_a_file_of_their_own() -> None:
    assert released((0, 18, 9)) == released((0, 18, 0))
    assert released((1, 0, 0)) == released((0, 18, 0))
    assert released((0, 5, 3)) is None


def test_a_released_library_is_known_by_its_hash() -> None:
    assert not is_released((0, 18, 0), "x")
    assert not is_released((0, 5, 0), "x")
