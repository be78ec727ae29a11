"""The teacher at prediction: its scores against the formula in double precision, its tokens against those of
cache-clip, and the rule by which a query is left out against maps in which none is."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from quarters import CLASSES, HEIGHT, THRESHOLDS, WIDTH, perfect, quarters
from tiny import QUIET, build, tiny_config
from torch import Tensor

from models.teacher import Teacher, load_teacher
from pipeline import scenes
from pipeline.data.transforms import channels_first
from pipeline.inference.maps import Output, choose, panoptic_map
from pipeline.inference.model import load_model
from pipeline.inference.teacher import (
    TeacherAtPrediction,
    cached_options,
    can_be_chosen,
    load_for_prediction,
    mask_tokens,
    teacher_log_scores,
    with_teacher,
)
from pipeline.teacher.config import TokensConfig
from pipeline.teacher.encode import encode_tar
from pipeline.teacher.masks import encode_masks
from storage.shards import Shards, decode_ids, decode_image, read_shard
from storage.store import Store
from storage.tokens import read_tokens

OPTIONS: list[dict[str, Any]] = [
    {}, {"batch": 3}, {"resize": "letterbox"}, {"crop": "box", "margin": 0.2, "resize": "letterbox"},
    {"method": "attention"}, {"method": "attention", "resize": "letterbox"},
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(name="small", pretrained="shipped", fill="mean")


def unit(*shape: int, rng: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=rng), dim=-1)


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("sentences", [0, 3])
@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 0.8), (0.0, 1.0), (0.7, 0.2), (1.0, 1.0)])
def test_q_is_the_formula(alpha: float, beta: float, sentences: int) -> None:
    rng = torch.Generator().manual_seed(sentences)
    text = unit(*((7, sentences, 6) if sentences else (7, 6)), rng=rng)
    tokens, queries, scale = unit(4, 6, rng=rng), torch.tensor([0, 2, 3, 8]), 60.0
    logits, seen = 6 * torch.randn(9, 7, generator=rng), torch.tensor([True, True, False, True, False, True, False])
    found = (
        with_teacher(logits, queries, teacher_log_scores(tokens, text, scale), seen, alpha=alpha, beta=beta)
        .double()
        .sigmoid()
    )
    for query in range(9):
        p = 1 / (1 + np.exp(-logits[query].double().numpy()))
        expected = p
        if query in queries:
            token = tokens[queries.tolist().index(query)].double().numpy()
            cosines = (text.double().numpy() @ token).reshape(7, -1).max(1)
            t = np.exp(scale * cosines) / np.exp(scale * cosines).sum()
            w = np.where(seen.numpy(), alpha, beta)
            expected = p ** (1 - w) * t**w
        np.testing.assert_allclose(found[query].numpy(), expected, rtol=2e-5)


def test_scores_that_float32_cannot_hold_keep_their_order() -> None:
    """t of 1e-87 and p of 1e-43: q would be 0 from the scores themselves."""
    logits = torch.tensor([[-100.0, -99.0, 30.0, 30.0]])
    log_t = torch.tensor([[-200.0, -190.0, -1e-9, -1e-6]])
    q = with_teacher(logits, torch.tensor([0]), log_t, torch.tensor([True, False, True, False]), alpha=0.4, beta=0.8)
    expected = [-0.6 * 100 - 0.4 * 200, -0.2 * 99 - 0.8 * 190]
    torch.testing.assert_close(q[0, :2], torch.tensor(expected))
    assert torch.isfinite(q[0, :2]).all() and (q[0, 2:] > 10).all() and (q.sigmoid() <= 1).all()


def test_queries_without_a_token_keep_p_to_the_bit() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    log_t = torch.full((2, 4), -1.4)
    q = with_teacher(logits, torch.tensor([1, 3]), log_t, CLASSES.seen, alpha=0.4, beta=0.8)
    assert torch.equal(q[[0, 2, 4]], logits[[0, 2, 4]]) and not torch.isclose(q[[1, 3]], logits[[1, 3]]).any()
    none = with_teacher(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), CLASSES.seen, alpha=1, beta=1)
    assert torch.equal(none, logits)
    alone = with_teacher(logits, torch.tensor([1, 3]), log_t, CLASSES.seen, alpha=0.0, beta=0.0)
    torch.testing.assert_close(alone, logits)


# ------------------------------------------------------------------------------------------------ who needs a token


@examples(100)
@given(
    seed=st.integers(0, 2**32 - 1),
    threshold=st.sampled_from([0.05, 0.3, 0.6]),
    alpha=st.sampled_from([0.0, 0.4, 0.9]),
    beta=st.sampled_from([0.0, 0.8, 1.0]),
)
def test_a_query_that_cannot_be_chosen_needs_no_token(seed: int, threshold: float, alpha: float, beta: float) -> None:
    """The panoptic map with the tokens of all queries, and with those alone that the rule leaves: whatever the tokens
    are, the map is the same."""
    rng = torch.Generator().manual_seed(seed)
    output = Output(
        features=torch.zeros(12, 2), masks=3 * torch.randn(12, 4, 6, generator=rng), padded_size=(8, 12),
        image_size=(8, 12), original_size=(9, 11),
    )  # fmt: skip
    logits, log_t = 4 * torch.randn(12, 4, generator=rng) - 4, (8 * torch.randn(12, 4, generator=rng)).log_softmax(1)
    weights = {"alpha": alpha, "beta": beta}
    left = can_be_chosen(logits, CLASSES.seen, threshold, **weights).nonzero()[:, 0]
    thresholds = replace(THRESHOLDS, object_threshold=threshold)
    whole = with_teacher(logits, torch.arange(12), log_t, CLASSES.seen, **weights)
    part = with_teacher(logits, left, log_t[left], CLASSES.seen, **weights)
    (ids, segments), (others, found) = (panoptic_map(output, q, CLASSES, thresholds) for q in (whole, part))
    assert np.array_equal(ids, others) and segments == found
    assert set(choose(whole.sigmoid(), CLASSES.seen, thresholds).queries.tolist()) <= set(left.tolist())


def test_the_rule_leaves_queries_out() -> None:
    logits = torch.tensor([[-9.0, -9.0, -9.0, -9.0], [3.0, -9.0, -9.0, -9.0], [-9.0, -1.0, -9.0, -9.0]])
    assert can_be_chosen(logits, CLASSES.seen, 0.3, alpha=0.4, beta=0.8).tolist() == [False, True, True]
    assert can_be_chosen(logits, CLASSES.seen, 0.3, alpha=1.0, beta=0.8).all()  # the teacher decides alone


def test_a_query_with_an_empty_mask_has_no_token_and_no_segment(teacher: Teacher) -> None:
    """Whatever it scores: a segment is made of pixels at which the mask is at least 0.5."""
    output, logits = perfect(quarters())
    image = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    queries, tokens = mask_tokens(teacher, image, output, TokensConfig())
    assert queries.tolist() == [0, 1, 2, 3, 4] and tokens.shape == (5, teacher.dim)
    assert mask_tokens(teacher, image, output, TokensConfig(min_area=200))[0].tolist() == [0, 1, 2]
    none, rows = mask_tokens(teacher, image, output, TokensConfig(), among=torch.tensor([5, 6]))
    assert none.shape == (0,) and rows.shape == (0, teacher.dim)
    logits[5:] = torch.tensor([20.0, -20.0, -20.0, -20.0])
    assert len(panoptic_map(output, logits, CLASSES, THRESHOLDS)[1]) == 5


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "plain")
def test_tokens_are_those_of_cache_clip(
    options: dict[str, Any], teacher: Teacher, shared_store: Store, tmp_path: Path
) -> None:
    """For masks that are segments; in parts as in one piece."""
    shards = Shards(shared_store.path(build(shared_store, tiny_config(), until="shard")["shard"].recipe.ref))
    config, tar = TokensConfig(**options), shards.tars("val")[0]
    data = tiny_config().data
    assert isinstance(data, scenes.ScenesConfig)
    world = scenes.benchmark(data)
    encode_tar(teacher, tar, tmp_path / "a.zarr", config, world, hide=False, progress=lambda *_: None)
    group, compared = read_tokens(tmp_path / "a.zarr"), 0
    for row, sample in enumerate(read_shard(tar)):
        ids = torch.from_numpy(decode_ids(sample))
        masks = torch.stack([ids == s.id for s in sample.segments])
        image = channels_first(decode_image(sample))
        found = encode_masks(teacher, image, masks, config)
        assert np.allclose(found.numpy(), group.instance[group.rows(row)].astype(np.float32), atol=1e-3)
        torch.testing.assert_close(encode_masks(teacher, image, (masks[:2], masks[2:]), config), found)
        compared += len(found)
    assert compared > 20


def test_masks_may_overlap(teacher: Teacher) -> None:
    """A mask's token is its own, whatever the others cover."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8, generator=rng)
    masks = torch.zeros(3, 40, 50, dtype=torch.bool)
    masks[0, 5:30, 5:30], masks[1, 10:35, 10:45], masks[2] = True, True, True
    for config in (TokensConfig(), TokensConfig(method="attention"), TokensConfig(crop="box")):
        together = encode_masks(teacher, image, masks, config)
        alone = torch.cat([encode_masks(teacher, image, mask[None], config) for mask in masks])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        assert (together[0] @ together[1]) < 0.9999


# ------------------------------------------------------------------------------------------------ at prediction


def test_logits_of_an_image(teacher: Teacher) -> None:
    """Composed by hand of tokens and formula."""
    output, logits = perfect(quarters())
    rng = torch.Generator().manual_seed(1)
    image = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=rng)
    classes = replace(CLASSES, text=unit(4, teacher.dim, rng=rng))
    at_prediction = TeacherAtPrediction(teacher=teacher, options=TokensConfig(), alpha=0.2, beta=0.3)
    found = at_prediction.logits(image, output, logits, classes)
    masks = torch.from_numpy(np.stack([decode_ids(quarters()) == s.id for s in quarters().segments]))
    tokens = encode_masks(teacher, image, masks, TokensConfig())
    log_t = teacher_log_scores(tokens, classes.text, float(teacher.clip.logit_scale.exp()))
    expected = with_teacher(logits, torch.arange(5), log_t, classes.seen, alpha=0.2, beta=0.3)
    torch.testing.assert_close(found, expected)


def test_the_teacher_is_found_with_the_options_of_the_cache(
    shared_store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = build(shared_store, tiny_config(), until="v2c")
    folder = shared_store.path(steps["v2c"].recipe.ref)
    assert cached_options(folder, shared_store) == tiny_config().tokens
    meta = load_model(folder).meta
    found = load_for_prediction(meta, folder, shared_store, QUIET, weights="", alpha=0.4, beta=0.8)
    assert found.scale == pytest.approx(float(found.teacher.clip.logit_scale.exp())) and found.scale > 1
    with caplog.at_level(logging.WARNING):
        assert cached_options(folder, Store(tmp_path)) == TokensConfig()
    assert "does not have its tokens" in caplog.text
    for alpha, beta in ((-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match="--alpha and --beta must lie in 0..1"):
            load_for_prediction(meta, folder, shared_store, QUIET, weights="", alpha=alpha, beta=beta)
    linear = replace(meta, architecture={**meta.architecture, "projector": {"classes": 4}})
    with pytest.raises(ValueError, match="classifier is linear and has no class embeddings"):
        load_for_prediction(linear, folder, shared_store, QUIET, weights="", alpha=0.4, beta=0.8)
    gone = json.loads((folder / "meta.json").read_text())["classes"]["teacher"] | {"name": "ViT-B-16"}
    away = replace(meta, classes=replace(meta.classes, teacher=gone))
    with pytest.raises(ValueError, match="teacher ViT-B-16 had local weights; pass --teacher.pretrained FILE"):
        load_for_prediction(away, folder, shared_store, QUIET, weights="", alpha=0.4, beta=0.8)
