"""The vision-centric comparison's parts: a classifier that cannot know what it was not shown, a generator without
language losses.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import QUIET, build, tiny_config

from models.vision_centric import PRIOR, LinearClassifier, PrimitiveGenerator
from pipeline.inference.model import load_model
from pipeline.inference.vocabulary import Lexicon
from pipeline.inference.words import read_words
from storage.store import Store


def test_before_training_every_class_has_the_prior_and_a_row_chooses_its_class() -> None:
    classifier = LinearClassifier(dim=5, classes=4)
    features = torch.randn(2, 3, 5)
    torch.testing.assert_close(
        classifier.logits(classifier(features), torch.eye(4)).sigmoid(), torch.full((2, 3, 4), PRIOR)
    )
    torch.nn.init.normal_(classifier.linear.weight)
    every = classifier.logits(classifier(features), torch.eye(4))
    torch.testing.assert_close(every, features @ classifier.linear.weight.T + classifier.linear.bias)
    torch.testing.assert_close(classifier.logits(classifier(features), torch.eye(4)[[2, 0]]), every[..., [2, 0]])


def test_classes_that_are_not_asked_for_get_no_gradient() -> None:
    classifier = LinearClassifier(dim=5, classes=4)
    classifier.logits(torch.randn(6, 5), torch.eye(4)[[1, 3]]).square().sum().backward()
    gradient = classifier.linear.weight.grad
    assert gradient is not None and not gradient[[0, 2]].any() and gradient[[1, 3]].any()


def test_primitives_depend_on_text_and_noise_and_not_on_the_features() -> None:
    torch.manual_seed(0)
    generator = PrimitiveGenerator(dim=6, text_dim=8, hidden=16, text_scale=1.0)
    text, eps = torch.randn(5, 8), torch.randn(5, 8)
    made, mu, log_var = generator(torch.randn(5, 6), text, eps)
    assert made.shape == (5, 6) and not mu.any() and not log_var.any()
    torch.testing.assert_close(generator(torch.zeros(5, 6), text, eps)[0], made)
    assert (generator(torch.zeros(5, 6), text, -eps)[0] - made).abs().max() > 1e-4
    assert (generator(torch.zeros(5, 6), -text, eps)[0] - made).abs().max() > 1e-4
    torch.testing.assert_close(
        generator(torch.zeros(2, 6), text[:2], eps[:2])[0], made[:2]
    )  # rows do not see each other


@pytest.mark.slow
def test_a_run_with_it_knows_its_own_classes_alone(shared_store: Store) -> None:
    tiny = tiny_config()
    config = replace(
        tiny,
        g2s=replace(tiny.g2s, generator="primitives", diversity_weight=0.0, semantic_weight=0.0),
        cpa=replace(tiny.cpa, classifier="linear", lr=1e-2),
    )
    steps = build(shared_store, config)
    model = load_model(shared_store.path(steps["cpa"].recipe.ref))
    assert isinstance(model.projector, LinearClassifier)
    classes = len(model.meta.classes.names)
    assert model.text.equal(torch.eye(classes))
    assert model.logits(torch.randn(3, model.query_shape[1]), model.text).shape == (3, classes)
    with pytest.raises(ValueError, match="linear and knows no other classes"):
        Lexicon(model, "", QUIET).vocabulary(read_words(["green zebra"]))
