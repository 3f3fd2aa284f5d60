"""Sizes as people write them, and rounding."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_vmm.units import GIB, KIB, MIB, ceil_to, floor_to, format_size, parse_size

counts = st.integers(min_value=0, max_value=1 << 50)
steps = st.integers(min_value=1, max_value=1 << 30)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("0", 0),
        ("1k", KIB),
        ("512MiB", 512 * MIB),
        ("512M", 512 * MIB),
        ("512mb", 512 * MIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("  2 G  ", 2 * GIB),
        ("2T", 2048 * GIB),
        ("7B", 7),
    ],
)
def test_a_size_reads_as_people_mean_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "lots", "-1", "+1", "1..5", "1.", ".5", "5X", "1GG", "1 2", "0x10", "nan", "inf"],
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 512MiB or 2GiB") as refused:
        parse_size(text)
    assert repr(text) in str(refused.value)


def test_a_number_with_hundreds_of_digits_is_refused_like_any_other_nonsense() -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size("9" * 400)


@pytest.mark.parametrize("text", ["5i", "5iB"])
def test_half_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@given(counts)
def test_a_number_of_bytes_is_read_exactly(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(min_value=0, max_value=1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_a_round_size_survives_writing_and_reading(number: int, unit: str) -> None:
    size = parse_size(f"{number} {unit}")
    assert parse_size(format_size(size)) == size


@given(counts)
def test_a_written_size_is_within_a_twentieth_of_the_truth(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size / 20


@given(st.text(max_size=100))
def test_random_text_is_a_size_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (1536 * MIB, "1.5 GiB"),
        (5 << 40, "5 TiB"),
        (-MIB, "-1 MiB"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_that_fits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(counts, steps)
def test_rounding_brackets_the_value_by_less_than_a_step(value: int, step: int) -> None:
    below, above = floor_to(value, step), ceil_to(value, step)
    assert below <= value <= above
    assert below % step == above % step == 0
    assert above - below == (0 if value % step == 0 else step)
