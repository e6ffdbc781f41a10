"""Prefixes as numbers."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.model.net import Prefix, compact, expand


@given(st.integers(0, 32), st.integers(0, (1 << 32) - 1), st.integers(0, 128), st.integers(0, (1 << 128) - 1))
def test_a_prefix_and_its_compact_number_are_the_same_thing(length4, address4, length6, address6):
    four = Prefix(4, address4 >> 32 - length4 << 32 - length4, length4)
    six = Prefix(6, address6 >> 128 - length6 << 128 - length6, length6)
    assert (expand(compact(four)), expand(compact(six))) == (four, six)
    assert compact(four) != compact(six)
    assert (compact(four) < 1 << 32) == four.is_host
