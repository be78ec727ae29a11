"""Checkpoints without pickle: tensors as safetensors, everything else as JSON.

A training state is one file, so that a kill between two writes cannot mix two states.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from storage.atomic import replacing, write_text
from storage.errors import NO_FILE, UserError, anew

WEIGHTS = "weights.safetensors"
META = "meta.json"
STATE = "training.safetensors"
FILES = (WEIGHTS, META)


def save_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write weights.safetensors and meta.json (JSON values) into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(meta), indent=1, allow_nan=False) + "\n"
    # clones, because safetensors refuses tensors that share memory
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _save(folder / WEIGHTS, owned)
    write_text(folder / META, text)


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the meta data. Raises UserError, naming the folder, when either is missing or damaged,
    OSError when one cannot be read."""
    try:
        _require_readable(folder / WEIGHTS)
        return load_file(folder / WEIGHTS), json.loads((folder / META).read_bytes())
    except (*NO_FILE, ValueError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"checkpoint {folder} is missing or damaged ({reason}); {anew()}") from error


def save_training_state(folder: Path, state: Mapping[Any, Any]) -> None:
    """Write a nested state (model, optimiser, step, random generators) as one file, whole or not at all.

    Dicts keep their order and their string or integer keys; lists, tuples, tensors, str, int of any size, float, bool
    and None come back as they were, tensors on the CPU. Raises TypeError for anything else.
    """
    tensors: list[torch.Tensor] = []
    structure = _flatten(state, tensors)
    owned = [tensor.detach().cpu().contiguous().clone() for tensor in tensors]  # safetensors refuses shared memory
    # safetensors has no checksum of its own, and writes several metadata entries in random order: so one
    metadata = {"structure": json.dumps([structure, _checksum(structure, owned)])}
    _save(folder / STATE, {f"{i:06d}": tensor for i, tensor in enumerate(owned)}, metadata)


def load_training_state(folder: Path) -> Any | None:
    """The last saved state, tensors on the CPU; None when there is none. Raises UserError when it is damaged, OSError
    when it cannot be read."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        _require_readable(path)
        with safe_open(path, framework="pt") as file:
            structure, checksum = json.loads(file.metadata()["structure"])
            tensors = [file.get_tensor(name) for name in sorted(file.keys())]
        if checksum != _checksum(structure, tensors):
            raise UserError("its checksum differs")
        return _unflatten(structure, tensors)
    except (*NO_FILE, ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError) as error:
        raise UserError(f"training state {path} is damaged; delete it to train from the start") from error


def _require_readable(path: Path) -> None:
    """Raises OSError. safetensors takes any file that it cannot open for one that is missing."""
    path.open("rb").close()


def _save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
            # safetensors puts a file of mode 600 in its place, whatever the umask
            temporary.chmod(mode)
        except SafetensorError as error:
            # a full disk and similar faults as the OSError that callers handle
            if number := re.search(r"os error (\d+)", str(error)):
                code = int(number[1])
                raise OSError(code, os.strerror(code), str(path)) from error
            raise


def _checksum(structure: Any, tensors: Sequence[torch.Tensor]) -> int:
    """CRC-32 over structure, types, shapes and bytes of contiguous tensors on the CPU."""
    crc = zlib.crc32(json.dumps(structure).encode())
    for tensor in tensors:
        crc = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _flatten(value: Any, tensors: list[torch.Tensor]) -> Any:
    """JSON for `value`: containers and tensors become one-entry objects, plain values stay."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):
        if not all(type(key) in (int, str) for key in value):
            raise TypeError(f"a training state's keys are strings or integers, not {list(value)[:3]}")
        return {"dict": [[key, _flatten(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_flatten(item, tensors) for item in value]}
    raise TypeError(f"a training state cannot hold a {type(value).__name__}")


def _unflatten(node: Any, tensors: list[torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    items = [_unflatten(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
