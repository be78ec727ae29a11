"""Writes image files of modes and depths that Pillow does not write, byte by byte."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def png(samples: np.ndarray, bits: int, *, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG of samples (H, W) or (H, W, C): grey, grey + alpha, RGB or RGBA by C; `chunks` come before the pixels."""
    height, width, count = (*samples.shape, 1)[:3]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    rows = [
        int("".join(f"{value:0{bits}b}" for value in row), 2) << -len(row) * bits % 8
        for row in samples.reshape(height, -1).tolist()
    ]
    size = -(-width * count * bits // 8)
    packed = zlib.compress(b"".join(b"\0" + row.to_bytes(size, "big") for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    every = ((b"IHDR", header), *chunks, (b"IDAT", packed), (b"IEND", b""))
    body = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in every)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(samples: np.ndarray, bits: int, *, photometric: int, orientation: int = 1, kind: int = 1) -> bytes:
    """An uncompressed TIFF of samples (H, W) or (H, W, C); `kind` 1, 2, 3: unsigned, signed, float. 12 bits are packed."""
    height, width, count = (*samples.shape, 1)[:3]
    if bits == 12:
        rows = ["".join(f"{value:012b}" for value in row) for row in samples.tolist()]
        pixels = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    else:
        pixels = samples.astype(f"<{'uif'[kind - 1]}{bits // 8}").tobytes()
    values = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 274: orientation, 277: count, 278: height,
        279: len(pixels), 284: 1, 339: kind,
    }  # fmt: skip
    ifd = 8 + len(pixels) + len(pixels) % 2
    depths, behind = struct.pack(f"<{count}H", *[bits] * count), ifd + 2 + 12 * len(values) + 4
    entries = []
    for tag, value in values.items():
        if tag == 258 and count > 2:
            entries.append(struct.pack("<HHII", tag, 3, count, behind))
        else:
            entries.append(struct.pack("<HHII", tag, 4, 1, 8 if tag == 273 else value))
    body = pixels + b"\0" * (len(pixels) % 2)
    table = struct.pack("<H", len(values)) + b"".join(entries) + bytes(4) + depths
    return struct.pack("<2sHI", b"II", 42, ifd) + body + table
