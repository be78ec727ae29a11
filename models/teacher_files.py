"""Where networks' weights lie: the two that ship with the package, a teacher in the layout of its repository on the
hub, and a backbone's on ImageNet.

Imports no torch, so that every config may import it.
"""

from __future__ import annotations

from pathlib import Path

SMALL_CLIP = Path(__file__).parent / "small_clip"  # config and weights of the shipped teacher
SMALL_BACKBONE = Path(__file__).parent / "small_backbone"  # <timm name>.safetensors

# The ImageNet weights of a backbone, by timm's names, where the published ones are not timm's default. The released
# configurations of Mask2Former, MaskFormer and PADing, and MMDetection's, start ResNet-50 from torchvision's first
# weights, trained by the recipe of He et al. 2016; timm's default, resnet50.a1_in1k, is of a longer, stronger one.
IMAGENET = {"resnet50": "resnet50.tv_in1k"}

WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"  # architecture and preprocessing
TOKENIZER = "tokenizer.json"  # only of models whose text tower is not CLIP's own


def is_teacher_folder(path: str | Path) -> bool:
    """Whether `path` is a folder with an open_clip model in the layout of its repository."""
    return (Path(path) / CONFIG).is_file()
