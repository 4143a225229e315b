"""Aspect-ratio buckets: their sizes, the nearest one, and the batches drawn."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nanosd3.data.buckets import Buckets, bucket_sizes, nearest
from nanosd3.errors import InputError
from nanosd3.random_streams import rng

SIDES = st.integers(1, 1500)


@st.composite
def arguments(draw):
    """Valid arguments of `bucket_sizes`."""
    multiple = draw(st.integers(1, 64))
    side = multiple * draw(st.integers(1, 40))
    return side, multiple, draw(st.integers(side, 4 * side)), draw(st.floats(1, 5))


# --- sizes --------------------------------------------------------------------------------------


def test_sizes_of_1024():
    tall = [(1024, 1024), (1088, 960), (1152, 896), (1280, 832), (1344, 768)]
    assert bucket_sizes(1024, 64, 2048) == [(w, h) for h, w in tall[:0:-1]] + tall
    assert bucket_sizes(1024, 64, 1152) == [(w, h) for h, w in tall[2:0:-1]] + tall[:3]
    assert bucket_sizes(1024, 64, 1024) == bucket_sizes(1024, 64, 2048, ratio=1) == [(1024, 1024)]
    assert bucket_sizes(1024, 64, 2048, ratio=2.1)[0] == (704, 1472)


def test_limits_are_inclusive():
    assert bucket_sizes(20, 5, 40, ratio=4)[0] == (10, 40)
    assert bucket_sizes(20, 5, 39, ratio=4)[0] == (15, 25)
    assert bucket_sizes(20, 5, 40, ratio=3.9)[0] == bucket_sizes(20, 5, 25)[0] == (15, 25)


def test_halves_are_rounded_down():
    assert (5, 7) in bucket_sizes(6, 1, 99, ratio=99)  # 36 / 5 = 7.2
    assert (8, 12) in bucket_sizes(10, 1, 99, ratio=99)  # 100 / 8 = 12.5


@given(arguments())
def test_properties_of_sizes(drawn):
    side, multiple, most, ratio = drawn
    sizes = bucket_sizes(*drawn)
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes) and sizes == sorted(sizes, key=lambda s: s[0] / s[1])
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % multiple == w % multiple == 0 and min(h, w) > 0 and max(h, w) <= most
        assert max(h, w) <= ratio * min(h, w)
        assert 2 * abs(h * w - side * side) <= multiple * min(h, w)


@given(arguments())
def test_sizes_are_complete(drawn):
    """Against exhaustive search for the longer side of the nearest area."""
    side, multiple, most, ratio = drawn
    expected = set()
    for short in range(multiple, side + 1, multiple):
        longs = range(multiple, side * side // short + 2 * multiple, multiple)
        best = min(longs, key=lambda long: abs(short * long - side * side))  # the first of ties
        if best <= most and best <= ratio * short:
            expected |= {(short, best), (best, short)}
    assert set(bucket_sizes(*drawn)) == expected


@pytest.mark.parametrize(
    ("side", "most", "ratio", "message"),
    [
        (100, 256, 2.0, "side 100: must be a positive multiple of 16"),
        (8, 256, 2.0, "side 8: must be a positive multiple of 16"),
        (0, 256, 2.0, "side 0: must be a positive multiple of 16"),
        (-16, 256, 2.0, "side -16: "),
        (272, 256, 2.0, "side 272: must be at most 256"),
        (256, 256, 0.5, "aspect ratio 0.5: must be at least 1"),
        (256, 256, math.nan, "aspect ratio nan"),
    ],
)
def test_sizes_refused(side, most, ratio, message):
    with pytest.raises(InputError) as refusal:
        bucket_sizes(side, 16, most, ratio)
    assert str(refusal.value).startswith(message)


# --- nearest ------------------------------------------------------------------------------------


@given(arguments(), SIDES, SIDES)
def test_nearest_is_nearest(drawn, height, width):
    sizes = bucket_sizes(*drawn)

    def distance(size):
        return abs(math.log(size[0] / size[1]) - math.log(height / width))

    chosen = nearest(sizes, height, width)
    assert chosen in sizes
    assert distance(chosen) <= min(map(distance, sizes)) + 1e-12


@given(arguments(), SIDES, SIDES)
def test_nearest_commutes_with_transposing(drawn, height, width):
    sizes = bucket_sizes(*drawn)
    assume(height != width)
    chosen, transposed = nearest(sizes, height, width), nearest(sizes, width, height)
    if chosen != transposed[::-1]:  # only for exact ties
        (a, b), (c, d) = chosen, transposed[::-1]
        assert max(a * width, b * height) * min(c * width, d * height) == pytest.approx(
            max(c * width, d * height) * min(a * width, b * height), rel=1e-12
        )


@given(arguments(), st.integers(1, 1000))
def test_images_of_a_bucket_size_go_to_that_bucket(drawn, scale):
    for h, w in bucket_sizes(*drawn):
        assert nearest(bucket_sizes(*drawn), h * scale, w * scale) == (h, w)


def test_ratios_are_compared_as_factors():
    """3:2 is a factor of 1.5 from 1:1 and 1.33 from 2:1; the differences are 0.5 and 0.5."""
    assert nearest([(8, 8), (16, 8)], 150, 100) == (16, 8)
    assert nearest([(8, 8), (8, 16)], 100, 150) == (8, 16)
    assert nearest([(8, 8), (16, 8)], 140, 100) == (8, 8)


def test_ties_go_to_the_larger_area():
    for sizes in ([(8, 16), (20, 10)], [(20, 10), (8, 16)]):
        assert nearest(sizes, 7, 7) == (20, 10)
    assert nearest([(3, 7), (7, 3)], 49, 49) == (3, 7)
    for sizes in ([(10, 30), (20, 60)], [(20, 60), (10, 30)]):
        assert nearest(sizes, 77, 231) == (20, 60)


# --- drawing ------------------------------------------------------------------------------------

SIZES = [(8, 8), (4, 16), (8, 8), (8, 8), (16, 4), (4, 16)]


def test_a_batch_comes_from_one_bucket():
    buckets = Buckets(SIZES)
    seen = set()
    for step in range(100):
        images = buckets.draw(5, rng("draw", step))
        assert images.shape == (5,) and images.dtype == torch.int64
        assert {SIZES[i] for i in images.tolist()} == {buckets.size_of(images)}
        seen |= set(images.tolist())
    assert seen == set(range(len(SIZES)))


def test_every_image_is_equally_likely():
    buckets, draws = Buckets(SIZES), 20000
    images = torch.cat([buckets.draw(4, rng("fair", step)) for step in range(draws)])
    share = images.bincount(minlength=6) / len(images)
    assert share.tolist() == pytest.approx([1 / 6] * 6, abs=0.01)
    firsts = [SIZES[i] for i in images[::4].tolist()]
    for size in set(SIZES):  # in proportion to its images
        assert firsts.count(size) / draws == pytest.approx(SIZES.count(size) / 6, abs=0.01)
    within = images.view(-1, 4)[:, :2]  # two images of a batch are independent
    assert (within[:, 0] == within[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_draws_depend_only_on_the_generator():
    first, second = Buckets(SIZES), Buckets(SIZES)
    for step in range(9):
        second.draw(3, rng("other", step))
    for step in reversed(range(20)):
        assert torch.equal(first.draw(7, rng("step", step)), second.draw(7, rng("step", step)))
    before = torch.get_rng_state()
    first.draw(7, rng("x"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_single_bucket_is_plain_randint():
    generator, plain = rng("one"), rng("one")
    buckets = Buckets([(28, 28)] * 1000)
    for _ in range(3):
        images = buckets.draw(64, generator)
        assert torch.equal(images, torch.randint(1000, (64,), generator=plain))
    assert torch.equal(generator.get_state(), plain.get_state())  # nothing more was drawn


def test_counts():
    buckets = Buckets(SIZES)
    assert list(buckets.counts().items()) == [((4, 16), 2), ((8, 8), 3), ((16, 4), 1)]
    assert buckets.size_of(torch.tensor([1, 5, 1])) == (4, 16)
    with pytest.raises(ValueError, match="too many values"):
        buckets.size_of(torch.tensor([0, 1]))
