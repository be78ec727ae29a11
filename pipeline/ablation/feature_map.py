"""The paper's figure 4 and its numbers: generated features of unseen classes beside real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.folding import for_inference
from models.generator import build_generator
from pipeline.data.benchmarks import Benchmark
from pipeline.data.samples import samples_with_tokens
from pipeline.inference.forward import outputs
from pipeline.inference.model import load_model
from pipeline.runtime import Runtime
from pipeline.scoring.rows import GroundTruth
from pipeline.scoring.waterfall import pair
from pipeline.teacher.text_bank import TextBank
from storage.checkpoints import load_checkpoint
from storage.keys import Ref
from storage.shards import Shards
from storage.store import Store

Features = Mapping[int, NDArray[np.float32]]  # class index -> (n, C)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of n classes, in features' units. `to_real` (n,): from each class's generated centre to its real one. `apart`,
    `really_apart`: mean distance between two classes' generated centres, and between two real ones. `nearest`: share
    of generated features whose nearest real centre is their own class's."""

    to_real: NDArray[np.float64]
    apart: float
    really_apart: float
    nearest: float

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """For JSON; `names` (n,) of the classes."""
        return asdict(self) | {"to_real": dict(zip(names, self.to_real.tolist(), strict=True))}


def real_features(
    store: Store, *, checkpoint: Ref, shards: Ref, tokens: Ref, benchmark: Benchmark, runtime: Runtime
) -> dict[int, NDArray[np.float32]]:
    """Class index -> features (n, C) of the queries nearest to the validation images' segments of that class, by their
    masks (see `waterfall.Pairs`), of every unseen class that occurs."""
    model = load_model(store.open(checkpoint).path, runtime.torch_device())
    found: dict[int, list[NDArray[np.float32]]] = {k: [] for k, seen in enumerate(benchmark.seen) if not seen}
    samples = samples_with_tokens(Shards(store.open(shards).path), store.open(tokens).path, workers=runtime.decoders)
    views = ((sample, image) for (sample, _), image in samples)
    for sample, output in outputs(for_inference(model.segmenter), views, model.meta.resize, batch=16):
        pairs = pair(GroundTruth(sample, benchmark), output)
        for k, query in zip(pairs.classes.tolist(), pairs.nearest.tolist(), strict=True):
            if k in found:
                found[k].append(output.features[query].float().cpu().numpy())
    return {k: np.stack(rows) for k, rows in found.items() if rows}


def generated_features(
    generator: Path, bank: TextBank, *, counts: Mapping[int, int], noise_into: Any, seed: int
) -> dict[int, NDArray[np.float32]]:
    """`counts` features of each class, drawn from `seed`."""
    weights, meta = load_checkpoint(generator)
    maker = build_generator(**meta["architecture"])
    maker.load_state_dict(weights)
    maker.eval()
    rng = torch.Generator().manual_seed(seed)
    return {
        k: maker.generate(bank.first[k].expand(count, -1), noise_into=noise_into, rng=rng).numpy()
        for k, count in counts.items()
    }


def compare(real: Features, made: Features) -> Comparison:
    """See `Comparison`; both hold the same classes, two or more."""
    classes = list(real)
    true, own = (np.stack([part[k].astype(np.float64).mean(0) for k in classes]) for part in (real, made))
    pairs = np.triu_indices(len(classes), 1)
    right = [
        np.linalg.norm(made[k].astype(np.float64)[:, None] - true, axis=-1).argmin(1) == i
        for i, k in enumerate(classes)
    ]
    return Comparison(
        to_real=np.linalg.norm(true - own, axis=1),
        apart=float(np.linalg.norm(own[pairs[0]] - own[pairs[1]], axis=1).mean()),
        really_apart=float(np.linalg.norm(true[pairs[0]] - true[pairs[1]], axis=1).mean()),
        nearest=float(np.concatenate(right).mean()),
    )


def draw(
    path: Path, panels: Mapping[str, tuple[Features, Features]], names: Sequence[str], *, seed: int = 0
) -> dict[str, Comparison]:
    """A PNG with one t-SNE (van der Maaten and Hinton 2008) a panel: real features as dots, generated ones as crosses.

    Args:
        panels: title -> (real, generated), the same classes in all panels. names: of all classes.

    Returns:
        the numbers that the titles and legends show.
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(6.6 * len(panels), 5.6), layout="constrained")
    compared: dict[str, Comparison] = {}
    for axes, (title, (real, made)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        rows = np.concatenate([*real.values(), *made.values()])
        perplexity = min(30.0, (len(rows) - 1) / 3)
        flat = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
        ends = np.cumsum([0, *map(len, real.values()), *map(len, made.values())])
        compared[title] = result = compare(real, made)
        for i, k in enumerate(real):
            colour = f"C{i}" if i < 10 else "#333333"
            points = flat[ends[i] : ends[i + 1]]
            crosses = flat[ends[len(real) + i] : ends[len(real) + i + 1]]
            axes.scatter(*points.T, s=9, color=colour, alpha=0.6, linewidths=0)
            axes.scatter(
                *crosses.T, s=20, color=colour, marker="x", linewidths=0.9, label=f"{names[k]}  {result.to_real[i]:.2f}"
            )
        axes.set_title(
            f"{title}: generated to real centre {result.to_real.mean():.2f}\n"
            f"centres apart {result.apart:.2f} generated, {result.really_apart:.2f} real; "
            f"nearest real centre right {100 * result.nearest:.0f} %",
            fontsize=9.5,
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(
            fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=4, frameon=False,
            title="x generated, dots real; distance of their centres", title_fontsize=7.5,
        )  # fmt: skip
    figure.savefig(path, dpi=110, facecolor="white")
    return compared
