"""Which frozen CLIP teaches: its config, the hash of its weights for the keys, and the loading of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from models.teacher_files import CONFIG, SMALL_CLIP, TOKENIZER, WEIGHTS, is_teacher_folder
from pipeline.runtime import Runtime
from pipeline.teacher.prompts import template_sets
from storage.errors import UserError
from storage.keys import sha256_file

if TYPE_CHECKING:
    from models.teacher import Teacher


Method = Literal["pixels", "attention"]
Crop = Literal["full", "box"]
Resize = Literal["squeeze", "letterbox"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen CLIP.

    `name`: an open_clip model, or "small" for the one shipped with the package. `pretrained`: an open_clip tag, a local weights
    file, a folder with the files of its repository on the hub (open_clip_model.safetensors, open_clip_config.json, and tokenizer.json
    where the text tower is not CLIP's own), "shipped" for the small one, or "random" (drawn from `seed`; the report is then marked). `fill`: what replaces the rest
    of the image around a masked instance, black or the teacher's mean colour; the shipped teacher knows only "mean" (D10).
    """

    name: str = "ViT-B-16-quickgelu"
    pretrained: str = "openai"
    fill: Literal["zero", "mean"] = "zero"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pretrained == "shipped" and (self.name != "small" or self.fill != "mean"):
            raise UserError(
                "teacher: the shipped weights belong to name 'small' and were trained with fill 'mean'; set both"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What goes into the keys: local files count by their content, not by their path.

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
        if self.name == "small":  # of open_clip's own models the name says the architecture and the preprocessing
            identity["config"] = f"sha256:{sha256_file(SMALL_CLIP / CONFIG)}"
        if self.pretrained == "random":
            identity["seed"] = self.seed
        return identity

    def load(self, runtime: Runtime) -> Teacher:
        from models.teacher import load_teacher

        return load_teacher(
            name=self.name, pretrained=self.pretrained, fill=self.fill, seed=self.seed, device=runtime.torch_device()
        )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a class name becomes a row: every sentence is encoded, the unit rows are averaged, the mean is made unit length.

    `templates`: the sentences, or the name of one set of `pipeline/teacher/templates.json`, which then stands here in full. A class
    name may list synonyms, "person, human": each gets a row of its own, and the class the largest of their logits. `clean_names`: see
    `class_names.clean`. `embeddings`: a .npy file (K, D) of rows made elsewhere, which replaces all that; `names`: its class names in
    order, a JSON list or one a line. The rows count by content, not by path.
    """

    templates: tuple[str, ...] = ("{}", "a {}", "a photo of a {}", "a picture of {}")
    clean_names: bool = False
    embeddings: str = ""
    names: str = ""

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
    """How the teacher looks at images and instances. All of it is in the key.

    `batch`: teacher inputs at a time, packed across images; a batch's size may move the last bits. `method`: "pixels" shows the
    teacher each instance alone, in the fill colour; "attention" shows it the image once, and each instance is a further CLS token
    that sees its own patches only (open_clip's ViTs and ResNets; much faster, and another token).
    `crop`: an instance is shown where it is in the whole image ("full"), or in a "box": a square around it, `margin` of its longer
    side wider at each side. `resize`: what is shown is stretched to the teacher's square input ("squeeze"), or keeps its shape between
    borders of the fill colour ("letterbox"). `min_area`: segments of fewer pixels are not encoded; their rows are zero, the
    instance loss leaves them out, and the report counts them as misnamed by its ceiling. `views`: 2 encodes the mirrored image too,
    for the mirrored training views. `dtype`: what the image tower computes in; rows are stored in float16 all the same.
    """

    batch: int = 128
    method: Method = "pixels"
    crop: Crop = "full"
    margin: float = 0.1
    resize: Resize = "squeeze"
    min_area: int = 0
    views: Literal[1, 2] = 1
    dtype: Precision = "float32"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"tokens: batch must be at least 1, not {self.batch}")
        if self.min_area < 0 or self.margin < 0:
            raise UserError("tokens: min_area and margin must be 0 or more")
        for field, allowed in (("method", Method), ("crop", Crop), ("resize", Resize), ("dtype", Precision)):
            if (value := getattr(self, field)) not in get_args(allowed):
                raise UserError(f"tokens: {field} must be one of {', '.join(get_args(allowed))}, not {value!r}")
        if self.views not in (1, 2):
            raise UserError(f"tokens: views must be 1, or 2 with the mirrored images, not {self.views}")
        if self.method == "attention" and self.crop == "box":
            raise UserError(
                "tokens: method 'attention' sees the whole image at once; set crop 'full', or method 'pixels'"
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
    seed = identity.get("seed", 0)  # only random weights have one
    config = TeacherConfig(name=identity["name"], pretrained=pretrained, fill=identity["fill"], seed=seed)
    if config.identity != identity:
        raise UserError(
            f"the weights at hand of teacher {identity['name']} are not those the checkpoint was trained with "
            f"({identity['pretrained'][:23]}...); pass these with --teacher.pretrained FILE"
        )
    return config
