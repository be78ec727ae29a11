"""The settings of the frozen CLIP and of what is encoded with it; its identity in the keys, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.teacher_files import CONFIG, SMALL_CLIP, TOKENIZER, WEIGHTS, is_teacher_folder
from pipeline.data.config import check_choices
from pipeline.runtime import Runtime
from pipeline.teacher.prompts import template_sets
from storage.errors import UserError
from storage.keys import option, sha256_file

if TYPE_CHECKING:
    from models.teacher import Teacher, Tokenizer


Method = Literal["pixels", "attention"]
Crop = Literal["full", "box"]
Resize = Literal["squeeze", "letterbox"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen CLIP.

    A folder of weights holds open_clip_model.safetensors and open_clip_config.json, and tokenizer.json where the text
    tower's tokenizer is not CLIP's own. The report says so where the weights are random.
    """

    name: str = "ViT-B-16-quickgelu"
    """open_clip model name (the paper: ViT-B/16), or small for the CLIP that is shipped and knows only generated
    scenes."""

    pretrained: str = "openai"
    """Weights: an open_clip tag, a local file, a folder with the files of the model's hub repository, shipped (those of
    small), or random."""

    fill: Literal["zero", "mean"] = "zero"
    """Colour of the pixels outside a masked instance: zero is black, mean the teacher's mean colour, which alone fits
    the shipped teacher (D10)."""

    seed: int = 0
    """Seed of random weights; not used with others."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.pretrained == "shipped" and (self.name != "small" or self.fill != "mean"):
            raise UserError(
                "teacher: the shipped weights belong to name 'small' and were trained with fill 'mean'; set both"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What of it goes into the keys: of local files the content, not the path.

        Raises UserError when `pretrained` looks like a file that is not there.
        """
        weights, extra = Path(self.pretrained), {}
        if self.pretrained == "shipped":
            weights = SMALL_CLIP / WEIGHTS
        elif is_teacher_folder(weights):
            files = {"config": weights / CONFIG, "tokenizer": weights / TOKENIZER}
            extra = {what: f"sha256:{sha256_file(file)}" for what, file in files.items() if file.is_file()}
            weights = weights / WEIGHTS
        if weights.is_file():
            pretrained = f"sha256:{sha256_file(weights)}"
        elif weights.suffix or len(weights.parts) > 1:
            raise UserError(f"teacher weights {weights} not found; correct --teacher.pretrained")
        else:
            pretrained = self.pretrained
        identity: dict[str, Any] = {"name": self.name, "pretrained": pretrained, "fill": self.fill, **extra}
        # the name of an open_clip model decides its architecture and preprocessing; ours is described by a file
        if self.name == "small":
            identity["config"] = f"sha256:{sha256_file(SMALL_CLIP / CONFIG)}"
        if self.pretrained == "random":
            identity["seed"] = self.seed
        return identity

    def load(self, runtime: Runtime) -> Teacher:
        from models.teacher import load_teacher

        return load_teacher(
            name=self.name, pretrained=self.pretrained, fill=self.fill, seed=self.seed, device=runtime.torch_device()
        )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer alone, without the weights."""
        from models.teacher import load_tokenizer

        return load_tokenizer(name=self.name, pretrained=self.pretrained)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a class name becomes a row of the text bank: its sentences are encoded, their unit embeddings averaged, and
    the mean normalised.

    A class name may list synonyms, "person, human": each has a row of its own, and the class the largest of their
    logits.
    """

    templates: tuple[str, ...] = ("{}", "a {}", "a photo of a {}", "a picture of {}")
    """Sentences with one {} each for the class name, or the name of a set: plain, short, or published (the eight of the
    paper's predecessors)."""

    clean_names: bool = False
    """Turn COCO's names into words before they are encoded: "sky-other-merged" becomes "sky", "wall-brick" "wall
    brick"."""

    embeddings: str = ""
    """A .npy file (K, D) of embeddings made elsewhere, in place of encoded sentences; needs names; its content is in
    the key, its path is not."""

    names: str = ""
    """File with the class name of each row of embeddings, in the benchmark's order: a JSON list, or one name per
    line."""

    def __post_init__(self) -> None:
        if len(self.templates) == 1 and "{}" not in self.templates[0]:
            sets = template_sets()
            if self.templates[0] not in sets:
                raise UserError(
                    f"text: template {self.templates[0]!r} needs exactly one {{}} for the class name, "
                    f"or be the name of a set: {', '.join(sets)}"
                )
            object.__setattr__(self, "templates", sets[self.templates[0]])
        if not self.templates or any(t.count("{}") != 1 for t in self.templates):
            raise UserError("text: every template needs exactly one {} for the class name")
        if bool(self.embeddings) != bool(self.names):
            raise UserError("text: embeddings and names belong together; pass --text.embeddings and --text.names")


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How the teacher encodes images and instances; all of it is in the key."""

    batch: int = 128
    """Teacher inputs per forward pass, at least 1, packed across images; another number may change the last bits."""

    method: Method = "pixels"
    """Token of an instance: pixels encodes it alone on the fill colour (the paper), attention encodes the image once
    with a CLS token per instance that attends to its patches only (open_clip's ViTs and ResNets)."""

    crop: Crop = "full"
    """Frame in which an instance is encoded: the full image, or with method pixels a square box around the instance."""

    margin: float = 0.1
    """With crop box, what the box extends beyond the instance at each side, as a share of the instance's longer side, 0
    or more."""

    resize: Resize = "squeeze"
    """How an image becomes the teacher's square input: squeeze stretches it, letterbox keeps its aspect ratio between
    borders of the fill colour."""

    min_area: int = 0
    """Area in pixels below which a segment is not encoded, 0 or more: its token is zero, and the instance loss leaves
    it out."""

    views: Literal[1, 2] = 1
    """1 encodes every image as it is; 2 also encodes it mirrored, for the mirrored training views."""

    dtype: Precision = "float32"
    """Precision in which the image tower computes; tokens are stored in float16 whatever it is."""

    regions: Literal["none", "components", "colours"] = option("none")
    """Also encode class-less regions of the area without a label in training images: none, its connected components, or
    these split by clusters of blurred colours, so that things that touch are apart."""

    region_min_area: int = option(40)
    """Area in pixels below which a part of the area without a label is no region, at least 1."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.batch < 1:
            raise UserError(f"tokens: batch must be at least 1, not {self.batch}")
        if self.min_area < 0 or self.margin < 0:
            raise UserError("tokens: min_area and margin must be 0 or more")
        if self.region_min_area < 1:
            raise UserError(f"tokens: region_min_area must be at least 1, not {self.region_min_area}")
        if self.method == "attention" and self.crop == "box":
            raise UserError(
                "tokens: method 'attention' encodes the whole image at once; set crop 'full', or method 'pixels'"
            )


def teacher_of(identity: dict[str, Any], weights: str) -> TeacherConfig:
    """The config of the teacher with this identity; `weights` is its local weights file, if it had one.

    Raises UserError when the weights at hand are not those the identity names by their hash.
    """
    pretrained = identity["pretrained"]
    if pretrained.startswith("sha256:"):
        pretrained = weights or ("shipped" if identity["name"] == "small" else "")
        if not pretrained:
            raise UserError(
                f"the checkpoint's teacher {identity['name']} had local weights; pass --teacher.pretrained FILE"
            )
    # only random weights have a seed
    seed = identity.get("seed", 0)
    config = TeacherConfig(name=identity["name"], pretrained=pretrained, fill=identity["fill"], seed=seed)
    if config.identity != identity:
        raise UserError(
            f"the weights at hand of teacher {identity['name']} are not those the checkpoint was trained with "
            f"({identity['pretrained'][:23]}...); pass these with --teacher.pretrained FILE"
        )
    return config
