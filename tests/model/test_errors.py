"""Random streams by name, values by what they are, messages of a bounded length."""

import numpy as np
import pytest
import torch

from nanosd3.arguments import real_number, several, truth_value, whole_number
from nanosd3.errors import InputError, listed, shortened, shown
from nanosd3.random_streams import rng

ONES = (
    1,
    np.int64(1),
    np.uint8(1),
    np.array(1),
    torch.tensor(1),
    torch.tensor(1, dtype=torch.int8),
)
NOT_WHOLE = (1.0, np.float64(1), True, np.True_, torch.tensor(True), torch.tensor(1.0), "1", b"1",
             None, [1], np.array([1]), torch.tensor([1]), 1j,
             torch.tensor(1, device="meta"), 10**5000)  # fmt: skip


def test_random_streams_are_named():
    draw = lambda *name: torch.rand(4, generator=rng(*name)).tolist()  # noqa: E731
    assert draw(0, "flow", 1) == draw(0, "flow", 1)
    streams = [
        draw(*name) for name in ((0, "flow", 1), (1, "flow", 1), (0, "t5", 1), (0, "flow", 2))
    ]
    assert len({tuple(stream) for stream in streams}) == 4


def test_streams_are_those_of_before():
    """Seeds keep their images: one number of three streams, as they always were."""
    names = ((0, "noise", 0), (-7, "flow", 12), ("validation", 3))
    drawn = [rng(*name).initial_seed() for name in names]
    assert drawn == [7057086449576365129, 1644557092574154555, 6727103425427218341]


def test_a_stream_depends_on_the_value_of_a_number():
    expected = rng(1, "noise", 0).initial_seed()
    for one in ONES:
        assert rng(one, np.str_("noise"), 0).initial_seed() == expected, repr(one)
        assert whole_number("seed", one) == 1 and type(whole_number("seed", one)) is int
    assert rng("1", "noise", 0).initial_seed() != expected  # a name may be text


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda value: type(value).__name__)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(InputError, match=r"^seed must be a whole number, got .+$"):
        whole_number("seed", value)
    if not isinstance(value, str):
        with pytest.raises(InputError, match="must be a whole number"):
            rng(value, "noise", 0)


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), torch.tensor(True)])
def test_a_truth_value_of_any_kind_is_its_value(value):
    assert truth_value("progress", value) is True
    assert truth_value("progress", ~torch.as_tensor(value)) is False


@pytest.mark.parametrize("value", [5, 5.0, np.float32(5), np.int16(5), torch.tensor(5.0),
                                   torch.tensor(5, dtype=torch.bfloat16), np.array(5)])  # fmt: skip
def test_a_number_of_any_kind_is_its_value(value):
    assert real_number("shift", value) == 5 and type(real_number("shift", value)) is float


@pytest.mark.parametrize("value", ["5", None, True, [5], torch.tensor([5.0]), 1j, 10**400,
                                   np.ma.masked])  # fmt: skip
def test_what_is_no_number_is_refused(value):
    with pytest.raises(InputError, match=r"^shift must be a number, got .+$"):
        real_number("shift", value)


def test_one_text_is_one():
    assert several("drop", "t5", "names") == ["t5"]
    assert several("drop", np.array("t5"), "names") == ["t5"]
    assert several("drop", (name for name in ("t5", "clip_l")), "names") == ["t5", "clip_l"]
    for value in (None, 1, np.array(1), torch.tensor(1), b"t5", {"t5": 1}):
        with pytest.raises(InputError, match=r"^drop must be names, got "):
            several("drop", value, "names")


def test_messages_are_short_and_of_one_line():
    assert shown("a\nb") == "'a\\nb'" and shown(5) == "5"
    assert shown("x" * 15000) == f"'{'x' * 80}'... (15,000 characters)"
    for value in (np.zeros((30, 30)), torch.zeros(3, 3), 10**5000, ["x"] * 999):
        assert len(shown(value)) <= 80 and "\n" not in shown(value)
    assert shortened("a  b\nc") == "a b c" and shortened("ab " * 9, 10) == "ab ab a..."
    assert listed(["a", "b"]) == "a, b" and listed(["x"] * 5000, 2) == "x, x and 4,998 more"
