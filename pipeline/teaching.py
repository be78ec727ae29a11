"""Which frozen CLIP teaches: its config, the hash of its weights for the keys, and the loading of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.teacher_files import CONFIG, TOKENIZER, WEIGHTS, is_teacher_folder
from pipeline.runtime import Runtime
from storage.keys import sha256_file

if TYPE_CHECKING:
    from models.teacher import Teacher

SMALL_CLIP = Path(__file__).parents[1] / "models" / "small_clip"


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
            raise ValueError(
                "teacher: the shipped weights belong to name 'small' and were trained with fill 'mean'; set both"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What goes into the keys: local files count by their content, not by their path.

        Raises ValueError when `pretrained` looks like a file that is not there.
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
            raise ValueError(f"teacher weights {weights} not found; correct --teacher.pretrained")
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
