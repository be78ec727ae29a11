"""Views: image and ids move together, whatever the draw; the test view is undone by the sizes it reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from whole_views import whole_view

from pipeline.data.transforms import (
    PIXEL_MEAN,
    PIXEL_STD,
    AugmentConfig,
    Placement,
    ResizeConfig,
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
