"""The frozen CLIP: any open_clip model, the small one that ships with the package included, behind a few methods.

Its image embedding is the paper's "CLS token" (D10: convolutional CLIPs have none). The whole image is resized into the
square input, never cropped at the centre, so that no instance lies outside it.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from models.errors import ModelError
from models.masked_attention import embed_by_instance, patch_grid
from models.teacher_files import CONFIG, SMALL_CLIP, TOKENIZER, WEIGHTS, is_teacher_folder

Fill = Literal["zero", "mean"]
Tokenizer = Callable[..., Tensor]
"""n sentences -> their token ids (n, L) int64, L the length that the text tower takes unless `context_length` names
another: longer ones are cut, shorter ones padded."""
Resize = Literal["squeeze", "letterbox"]


class Teacher(nn.Module):
    """A frozen CLIP with its own preprocessing. Embeddings are float32 rows of unit length, of width `dim`.

    `resize`, wherever it is taken: "squeeze" stretches the whole image to the square input of S pixels; "letterbox"
    keeps its shape, centred between borders of the fill colour.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Any, tokenizer: Tokenizer, *, fill: Fill) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        preprocess = clip.visual.preprocess_cfg
        size = preprocess["size"]
        self.image_size: int = size if isinstance(size, int) else size[0]
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1), persistent=False)
        self.fill = fill
        self._in_half: dict[torch.dtype, Any] = {}

    @property
    def dim(self) -> int:
        """Width D of the shared image and text space."""
        with torch.no_grad():
            return self.encode_texts(["a"]).shape[1]

    @property
    def background(self) -> Tensor:
        """The fill colour (3, 1, 1), normalised as a prepared image: black ("zero") or the teacher's mean ("mean")."""
        return torch.zeros_like(self.mean) if self.fill == "mean" else -self.mean / self.std

    def place(self, shape: Sequence[int], resize: Resize) -> tuple[int, int, int, int]:
        """Where an image of height and width `shape` lies in the square input: top, left, height, width."""
        if resize == "squeeze":
            return 0, 0, self.image_size, self.image_size
        height, width = (max(round(side * self.image_size / max(shape)), 1) for side in shape)
        return (self.image_size - height) // 2, (self.image_size - width) // 2, height, width

    def prepare(self, image: Tensor, resize: Resize = "squeeze") -> Tensor:
        """An image (3, H, W) uint8 as the teacher's normalised square input (3, S, S), bicubic with antialiasing."""
        top, left, height, width = self.place(image.shape[-2:], resize)
        small = F.interpolate(image[None].float(), size=(height, width), mode="bicubic", antialias=True)
        small = (small[0].clamp(0, 255) / 255 - self.mean) / self.std
        if (height, width) == (self.image_size, self.image_size):
            return small
        square = self.background.repeat(1, self.image_size, self.image_size)
        square[:, top : top + height, left : left + width] = small
        return square

    def mask(self, prepared: Tensor, masks: Tensor, resize: Resize = "squeeze") -> Tensor:
        """One input a segment, showing it alone: prepared image (3, S, S) and masks (O, H, W) bool -> (O, 3, S, S).

        The rest has the fill colour, which is part of the teacher (D10). A pixel of the small input is blended with the
        fill by the segment's share of it, so that thin segments do not vanish.
        """
        top, left, height, width = self.place(masks.shape[-2:], resize)
        share = F.interpolate(masks[:, None].float(), size=(height, width), mode="bilinear", antialias=True)
        if (height, width) != (self.image_size, self.image_size):
            right, bottom = self.image_size - left - width, self.image_size - top - height
            share = F.pad(share, (left, right, top, bottom))
        return torch.lerp(self.background, prepared, share)

    @torch.no_grad()
    def encode_images(self, inputs: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Embed prepared inputs (N, 3, S, S) -> (N, D), computing in `dtype`."""
        return F.normalize(self._clip(dtype).encode_image(inputs.to(dtype)).float(), dim=-1)

    @torch.no_grad()
    def encode_by_instance(self, images: Tensor, own: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Embed prepared images (B, 3, S, S), and their instances by the patches they own, in one pass -> (B, 1 + O,
        D).

        `own` (B, O, P) bool, P patches as in `patches`; see models/masked_attention.py.
        """
        return F.normalize(embed_by_instance(self._clip(dtype).visual, images.to(dtype), own).float(), dim=-1)

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of the image tower's patches. Raises ModelError as `masked_attention.patch_grid`."""
        return patch_grid(self.clip.visual)

    @torch.no_grad()
    def encode_texts(self, sentences: list[str]) -> Tensor:
        """Embed n sentences -> (n, D)."""
        device = next(self.clip.parameters()).device
        return F.normalize(self.clip.encode_text(self.tokenizer(sentences).to(device)).float(), dim=-1)

    def _clip(self, dtype: torch.dtype) -> Any:
        """The CLIP whose image tower computes in `dtype`; a copy of the tower is made once for each half precision."""
        if dtype == torch.float32:
            return self.clip
        if dtype not in self._in_half:
            # shares all modules; the image tower alone is replaced
            clip = copy.copy(self.clip)
            visual = _fuse_quick_gelu(copy.deepcopy(self.clip.visual)).to(dtype)
            clip._modules = {**self.clip._modules, "visual": visual}
            self._in_half[dtype] = clip
        return self._in_half[dtype]


def _fuse_quick_gelu(visual: nn.Module) -> nn.Module:
    """OpenAI's activation x sigmoid(1.702 x) as one kernel, SiLU(1.702 x) / 1.702, in place of three: the factor goes
    into the linear layer before it, in float32, and its inverse into the one behind it.

    Equal but for rounding; `visual` is changed and returned.
    """
    kinds = [nn.Linear, QuickGELU, nn.Linear]
    blocks: Any = [module for module in visual.modules() if [type(part) for part in module.children()] == kinds]
    for before, _, behind in blocks:
        before.weight.data *= 1.702
        before.bias.data *= 1.702
        behind.weight.data /= 1.702
    for block in blocks:
        block[1] = nn.SiLU(inplace=True)
    return visual


def load_teacher(
    *, name: str, pretrained: str, fill: Fill, seed: int = 0, device: torch.device | str = "cpu"
) -> Teacher:
    """Load a frozen CLIP through open_clip.

    `name` is an open_clip model name, or "small" for the architecture that ships with the package. `pretrained` is an
    open_clip tag (from the hub, or its cache on this machine), a local weights file, a folder with the files of the
    model's repository on the hub, "shipped" (the small one's own weights), or "random" for weights drawn from `seed`,
    which only makes sense in trials. The small one takes "shipped", "random" or a file.

    Raises ModelError where the model, its weights or its tokenizer cannot be had, naming what to fetch and where to put
    it.
    """
    if pretrained == "shipped" and name != "small":
        raise ModelError(f"teacher {name!r} with weights 'shipped': these are of the teacher 'small'")
    if name == "small" and pretrained not in ("shipped", "random") and not Path(pretrained).is_file():
        raise ModelError(
            f"teacher 'small' with weights {pretrained!r}: its weights are 'shipped', 'random', or a file that "
            "`python -m pipeline.world.train_teacher` made"
        )
    _require_transformers(name)
    folder = Path(pretrained) if is_teacher_folder(pretrained) else None
    preprocessing = None if name == "small" or pretrained == "random" else _preprocessing(name, pretrained, folder)
    # random weights are drawn without a change to the caller's random state
    with torch.random.fork_rng(devices=[]), _identifier(name, pretrained) as identifier:
        torch.manual_seed(seed)
        try:
            clip = open_clip.create_model(
                identifier,
                pretrained=None
                if name == "small" or pretrained == "random"
                else str(folder / WEIGHTS if folder else pretrained),
                load_weights=pretrained != "random",
                require_pretrained=pretrained != "random",
                # else a text tower of the hub would load its own weights
                pretrained_text=pretrained != "random",
                force_preprocess_cfg=preprocessing,
                device=torch.device(device),
            )
        except Exception as error:  # a broken file raises whatever its reader raises
            raise ModelError(_advice(name, pretrained, error)) from error
    return Teacher(clip, load_tokenizer(name=name, pretrained=pretrained), fill=fill).to(device)


@contextmanager
def _identifier(name: str, pretrained: str) -> Iterator[str]:
    """By which open_clip finds the model: of the small one a folder with its config, and with its weights, if any."""
    if name != "small" or pretrained in ("shipped", "random"):
        yield f"local-dir:{SMALL_CLIP}" if name == "small" else name
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).symlink_to(SMALL_CLIP / CONFIG)
        (Path(folder) / WEIGHTS).symlink_to(Path(pretrained).resolve())
        yield f"local-dir:{folder}"


def load_tokenizer(*, name: str, pretrained: str) -> Tokenizer:
    """The tokenizer alone of the teacher that `load_teacher` loads, without its weights.

    Raises ModelError where it cannot be had.
    """
    _require_transformers(name)
    if is_teacher_folder(pretrained):
        identifier = f"local-dir:{pretrained}"
    else:
        identifier = f"local-dir:{SMALL_CLIP}" if name == "small" else name
    try:
        return open_clip.get_tokenizer(identifier)
    except Exception as error:  # whatever its reader raises
        raise ModelError(_tokenizer_advice(name, error)) from error


def _require_transformers(name: str) -> None:
    if _uses_transformers(name) and find_spec("transformers") is None:
        raise ModelError(
            f"teacher {name!r} takes its tokenizer from the package transformers, which is not installed; the extra "
            "`hf` brings it: `make install-dev`, or `pip install --editable '.[hf]'` in the folder of zs-seg"
        )


def _preprocessing(name: str, pretrained: str, folder: Path | None) -> dict[str, Any] | None:
    """Mean and standard deviation of the weights' preprocessing, where open_clip does not determine them itself, as for
    a bare file; else None. Raises ModelError where they are ambiguous."""
    if folder:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("preprocess_cfg")
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    known = [{"mean": tag["mean"], "std": tag["std"]} for tag in tags]
    if not Path(pretrained).is_file() or not known:
        return None
    if any(one != known[0] for one in known):
        raise ModelError(
            f"weights of {name} differ in how images are normalised, and file {pretrained} does not contain it; put it "
            f"with its repository's {CONFIG} into a folder, as {WEIGHTS}, and pass --teacher.pretrained FOLDER"
        )
    return known[0]


def _advice(name: str, pretrained: str, error: Exception) -> str:
    """One line that names the missing weights and how to get them."""
    reason = _reason(error)
    if name == "small" and pretrained == "shipped":
        return f"the shipped teacher in {SMALL_CLIP} cannot be read ({reason}); install the package again"
    if name != "small" and name not in open_clip.list_models():
        listing = "python -c 'import open_clip; print(open_clip.list_models())'"
        return f"open_clip has no model {name!r}; `{listing}` lists them"
    cure = "download it again, or correct --teacher.name"
    if Path(pretrained).is_file():
        return f"weights file {pretrained} cannot be read as {name} ({reason}); {cure}"
    if is_teacher_folder(pretrained):
        return f"{Path(pretrained) / WEIGHTS} cannot be read as {name} ({reason}); {cure}"
    known = open_clip.get_pretrained_cfg(name, pretrained)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        return f"weights {pretrained!r} of {name} are neither a file nor a tag ({tags}): {reason}"
    repository, _, file = known["hf_hub"].rpartition("/")
    source = f"https://huggingface.co/{repository}/resolve/main/{file or WEIGHTS}" if repository else known["url"]
    return (
        f"cannot load weights {pretrained!r} of {name} ({reason}); fetch {source} on a machine with a network and pass "
        f"the file with --teacher.pretrained FILE"
        + f", or bring it into the cache {_cache()} with `hf download {repository}`"
        * bool(repository)
    )


def _text_config(name: str) -> dict[str, Any]:
    return (open_clip.get_model_config(name) or {}).get("text_cfg", {})


def _uses_transformers(name: str) -> bool:
    """Whether open_clip takes the text tower or the tokenizer of one of its models from the package transformers."""
    return name in open_clip.list_models() and not {"hf_model_name", "hf_tokenizer_name"}.isdisjoint(_text_config(name))


def _tokenizer_advice(name: str, error: Exception) -> str:
    """One line that names the missing tokenizer files and how to get them."""
    text = _text_config(name)
    repository = text.get("hf_tokenizer_name") or text.get("hf_model_name") or f"timm/{name}"
    return (
        f"the tokenizer of {name} cannot be had ({_reason(error)}); fetch {TOKENIZER}, tokenizer_config.json, {CONFIG} "
        f"and {WEIGHTS} of https://huggingface.co/{repository} into one folder and pass --teacher.pretrained FOLDER, "
        f"or load it once with a network, which fills the cache {_cache()}"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _cache() -> str:
    import huggingface_hub.constants

    return huggingface_hub.constants.HF_HUB_CACHE
