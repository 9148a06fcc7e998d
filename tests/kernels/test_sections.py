import pytest

from tests.kernels.device_code import elf
from turbofit.kernels.device_code import sections


def test_sections_have_their_names_and_places() -> None:
    data = elf({".text": b"abc", ".nv_fatbin": b"defg"})
    found = {one.name: data[one.offset : one.offset + one.size] for one in sections(data)}
    assert found[".text"] == b"abc"
    assert found[".nv_fatbin"] == b"defg"


@pytest.mark.parametrize("data", [b"", b"MZ" + bytes(100), b"\x7fELF\x01\x01" + bytes(100)])
def test_another_file_is_no_elf_file(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a 64-bit"):
        list(sections(data))


def test_a_file_that_is_cut_short() -> None:
    with pytest.raises(ValueError, match="cut short"):
        list(sections(elf({".text": b"abc"})[:-70]))
