"""Views: image and ids move together, whatever the draw; the test view is undone by the sizes it reports."""

from __future__ import annotations

import colorsys
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from whole_views import whole_view

from pipeline.data.colours import CONTRAST, HUE, SATURATION, distort_colours
from pipeline.data.config import AugmentConfig, ResizeConfig, SemanticAugmentConfig
from pipeline.data.transforms import (
    PIXEL_MEAN,
    PIXEL_STD,
    Placement,
    normalise,
    place_for_training,
    resize_for_test,
)


def picture(height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of constant colour whose red channel encodes their id, so that a view's image says what its ids must
    be.
    """
    rng = np.random.default_rng(seed)
    blocks = rng.integers(1, 5, (-(-height // 16), -(-width // 16)))
    ids = torch.from_numpy(np.kron(blocks, np.ones((16, 16), int))[:height, :width]).int()
    return torch.stack([ids * 60 - 30] * 3).to(torch.uint8), ids


def augment(image: Tensor, ids: Tensor, config: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor, bool]:
    placement = place_for_training(ids.shape[0], ids.shape[1], config, rng)
    return placement.image(image), placement.ids(ids, *placement.sources(*ids.shape)), placement.mirrored


@examples(40)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(0, 10**6), st.floats(0.05, 3.0), st.sampled_from([32, 64]),
    st.sampled_from([torch.uint8, torch.int16, torch.int32]),
)  # fmt: skip
def test_a_view_is_the_whole_image_resized_mirrored_cut_and_padded(
    height: int, width: int, seed: int, scale: float, side: int, dtype: torch.dtype
) -> None:
    """Byte for byte: of image and ids, bool of the flip, and the generator's state after it."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
    ids = torch.from_numpy(rng.integers(0, 9, (height, width))).to(dtype)
    config = AugmentConfig(size=side, jitter=(scale, 1.3 * scale), flip=bool(seed % 4))
    one, other = (np.random.default_rng(seed) for _ in range(2))
    found, expected = augment(image, ids, config, one), whole_view(image, ids, config, other)
    for tensor, same in zip(found[:2], expected[:2], strict=True):
        assert tensor.dtype == same.dtype and tensor.numpy().tobytes() == same.numpy().tobytes()
    assert found[2] == expected[2] and one.bit_generator.state == other.bit_generator.state


@examples(40)
@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 10**6), st.floats(0.3, 2.5))
def test_image_and_ids_stay_together(height: int, width: int, seed: int, scale: float) -> None:
    image, ids = picture(height, width)
    config = AugmentConfig(size=64, jitter=(scale, scale))
    view, view_ids, _ = augment(image, ids, config, np.random.default_rng(seed))
    assert view.shape == (3, 64, 64) and view_ids.shape == (64, 64)
    red = view[0] * PIXEL_STD[0] + PIXEL_MEAN[0]
    inside = view_ids > 0
    agree = (red[inside] - (view_ids[inside] * 60 - 30)).abs() < 25
    assert agree.float().mean() > 0.6  # all but the blurred borders between blocks
    assert (view[:, ~inside] == 0).all()  # padding is the mean colour


def test_a_flip_happens_half_of_the_time_and_a_view_depends_on_its_generator_alone() -> None:
    image, ids = picture(64, 64)
    config = AugmentConfig(size=64, jitter=(1.0, 1.0))
    views = [augment(image, ids, config, np.random.default_rng(seed))[1] for seed in range(200)]
    plain = sum(bool((view == ids).all()) for view in views)
    assert 70 < plain < 130
    assert all(bool((view == ids).all()) or bool((view == ids.flip(-1)).all()) for view in views)
    for seed in range(20):
        _, view, mirrored = augment(image, ids, config, np.random.default_rng(seed))
        assert bool((view == (ids.flip(-1) if mirrored else ids)).all())
    assert (augment(image, ids, config, np.random.default_rng(3))[1] == views[3]).all()


def test_large_ids_survive_resizing() -> None:
    ids = torch.tensor([[2**24 - 1, 2**24 - 3]], dtype=torch.int32).repeat(2, 1)
    placement = Placement(size=(4, 8), view=(32, 32))
    placed = placement.ids(ids, *placement.sources(2, 2))
    assert set(placed.unique().tolist()) == {0, 2**24 - 1, 2**24 - 3}


@pytest.mark.parametrize(
    ("shape", "size"), [((480, 640), (800, 1067)), ((300, 900), (444, 1333)), ((900, 300), (1333, 444))]
)
def test_the_test_view_has_the_published_size(shape: tuple[int, int], size: tuple[int, int]) -> None:
    view, inside = resize_for_test(torch.zeros(3, *shape, dtype=torch.uint8), ResizeConfig(short=800, longest=1333))
    assert inside == size
    assert all(p % 32 == 0 and 0 <= p - s < 32 for p, s in zip(view.shape[-2:], size, strict=True))
    assert (view[:, size[0] :] == 0).all() and (view[:, :, size[1] :] == 0).all()


def test_normalise_by_hand() -> None:
    assert torch.allclose(
        normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten(),
        torch.tensor([2.2489, 2.4286, 2.6400]),
        atol=1e-4,
    )


@pytest.mark.parametrize("wrong", [{"size": 100}, {"jitter": (0.0, 1.0)}, {"jitter": (2.0, 1.0)}])
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)  # type: ignore[arg-type]


def test_semantic_jitter_is_in_tenths() -> None:
    for jitter in ((0.55, 2.0), (0.5, 1.99)):
        with pytest.raises(ValueError, match="pair of tenths"):
            SemanticAugmentConfig(jitter=jitter)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 427), (100, 500)])
def test_a_semantic_view_has_its_shorter_side_at_a_published_length(height: int, width: int) -> None:
    """Mask2Former's lengths of the shorter side, 0.5 to 2.0 times the crop in tenths, by Detectron2's rule, which
    shrinks what is longer than 4 times the crop."""
    sizes = set[tuple[int, int]]()
    for short in (int(n * 0.1 * 640) for n in range(5, 21)):
        size = height * short / min(height, width), width * short / min(height, width)
        scale = min(1.0, 2560 / max(size))
        sizes.add((int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)))
    config = SemanticAugmentConfig()
    found = [place_for_training(height, width, config, np.random.default_rng(seed)).size for seed in range(400)]
    assert set(found) == sizes
    if len(sizes) == 16:
        assert max(found.count(size) for size in sizes) < 50  # each as likely


def hsv_turned(pixel: tuple[int, int, int], saturation: float, degrees: float) -> list[float]:
    hue, s, value = colorsys.rgb_to_hsv(*(x / 255 for x in pixel))
    return [255 * x for x in colorsys.hsv_to_rgb((hue + degrees / 360) % 1, min(s * saturation, 1), value)]


class Draws:
    """The draws of a generator, as given: the coins in order, and what the changes draw."""

    def __init__(self, coins: list[int], values: list[float]) -> None:
        self.coins, self.values, self.ranges = coins, values, list[tuple[float, float]]()

    def integers(self, low: int, high: int | None = None) -> int:
        if high is None:
            return self.coins.pop(0)
        self.ranges.append((low, high))
        return int(self.values.pop(0))

    def uniform(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        return self.values.pop(0)


def distorted(image: torch.Tensor, coins: list[int], values: list[float]) -> torch.Tensor:
    draws: Any = Draws(coins, values)
    changed = distort_colours(image, draws)
    assert not draws.coins and not draws.values
    return changed.float()


# brightness; contrast first; [contrast]; saturation; hue; [contrast]
def test_each_change_of_colours_against_its_formula() -> None:
    pixels = [*product((0, 3, 90, 128, 254, 255), repeat=3)]
    image = torch.tensor(pixels, dtype=torch.uint8).T.reshape(3, 12, 18)
    x = image.float()
    assert torch.equal(distorted(image, [0, 0, 0, 0, 0], []), x)
    assert torch.equal(distorted(image, [1, 0, 0, 0, 0], [-20.0]), (x - 20).clamp(0, 255))
    for coins in ([0, 1, 1, 0, 0], [0, 0, 0, 0, 1]):
        assert (distorted(image, coins, [1.3]) - (x * 1.3).clamp(0, 255)).abs().max() <= 0.5
    for saturation, hue in ((1.5, 0), (0.5, 0), (1.0, 18), (1.0, -7), (1.4, -18)):
        expected = torch.tensor([hsv_turned((r, g, b), saturation, 2 * hue) for r, g, b in pixels]).T.reshape(3, 12, 18)
        assert (distorted(image, [0, 0, 1, 1, 0], [saturation, hue]) - expected).abs().max() <= 0.51


def test_contrast_comes_first_or_last() -> None:
    """A bright pixel that contrast cuts off before the hue is turned, or after."""
    image = torch.tensor([250, 130, 20], dtype=torch.uint8).view(3, 1, 1)
    first = hsv_turned((255, 195, 30), 0.5, 36)
    last = [min(1.5 * x, 255) for x in hsv_turned((250, 130, 20), 0.5, 36)]
    assert max(abs(a - b) for a, b in zip(first, last, strict=True)) > 20
    for coins, values, expected in (([0, 1, 1, 1, 1], [1.5, 0.5, 18], first), ([0, 0, 1, 1, 1], [0.5, 18, 1.5], last)):
        assert (distorted(image, coins, values).flatten() - torch.tensor(expected)).abs().max() <= 0.51


def test_the_published_ranges_of_the_changes() -> None:
    draws: Any = Draws([1, 1, 1, 1, 1], [0.0, 1.0, 1.0, 0])
    distort_colours(torch.zeros(3, 1, 1, dtype=torch.uint8), draws)
    assert draws.ranges == [(-32, 32), (0.5, 1.5), (0.5, 1.5), (-18, 19)]
    assert (CONTRAST, SATURATION, HUE) == ((0.5, 1.5), (0.5, 1.5), 18)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 4, 4), np.uint8))
    changed = [distort_colours(image, np.random.default_rng(seed)) for seed in range(400)]
    same = sum(torch.equal(one, image) for one in changed)
    assert 12 <= same <= 45  # a sixteenth, and a few of which a change does nothing
    assert torch.equal(changed[3], distort_colours(image, np.random.default_rng(3)))
