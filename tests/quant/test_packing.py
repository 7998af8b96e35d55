import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbl_trl.errors import ConfigError
from qbl_trl.quant.packing import pack, unpack


def naive_pack(codes: list[int], bits: int) -> list[int]:
    """Little-endian inside each byte, one bit at a time."""
    stream = [(code >> bit) & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(stream[at + bit] << bit for bit in range(8)) for at in range(0, len(stream), 8)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.data())
def test_packing_matches_a_bit_by_bit_oracle_and_unpacks_to_the_same_codes(bits, data):
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=70))
    packed = pack(torch.tensor([codes]), bits)
    assert packed[0].tolist() == naive_pack(codes, bits)
    assert unpack(packed, bits, len(codes))[0].tolist() == codes


def test_the_first_of_two_4_bit_codes_is_the_low_nibble():
    assert pack(torch.tensor([0x3, 0xA]), 4).tolist() == [0xA3]


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"span \[0, 16\], allowed: \[0, 15\]"):
        pack(torch.tensor([0, 16]), 4)


def test_other_widths_are_refused():
    with pytest.raises(ConfigError, match="bits=3 is not supported; allowed: 2, 4, 8"):
        pack(torch.tensor([0]), 3)
