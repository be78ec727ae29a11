"""Video files to frames, and pictures to a video file, by PyAV, which the extra `video` brings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import UserError

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """What the header of a video file states: pictures a second, and their number, 0 = not stated."""

    rate: Fraction
    frames: int


def require_video() -> None:
    """Raises UserError where PyAV is not installed."""
    if find_spec("av") is None:
        raise UserError(
            "video files are read by PyAV, which is not installed; the extra `video` brings it: `make install-dev`, or "
            "`pip install --editable '.[video]'` in the folder of zs-seg"
        )


def check_video(path: Path) -> VideoFile:
    """Raises UserError, naming the file, if it is no video file or holds no pictures, or PyAV is missing."""
    require_video()
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return VideoFile(rate=Fraction(stream.average_rate or 25), frames=stream.frames)
    except (FFmpegError, IndexError) as error:
        raise _unreadable(path, error) from error


def read_frames(path: Path, *, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """(number, image (H, W, 3) uint8 RGB) of the frames number 0, `every`, 2 `every`, ..., upright as players show them.

    Raises UserError, naming the file, where it is damaged; what lies before the damage comes first.
    """
    import av
    import numpy as np
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    image = frame.to_ndarray(format="rgb24")
                    yield number, np.ascontiguousarray(np.rot90(image, frame.rotation // 90))
    except (FFmpegError, IndexError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = "it holds no pictures" if isinstance(error, IndexError) else " ".join(str(error).split())
    return UserError(f"video {path} cannot be read ({reason}); replace it or leave it out")


class VideoWriter:
    """An MP4 file (H.264, 4:2:0, so that every browser plays it) of pictures of one size, `rate` a second."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        import av

        self._container: Any = av.open(str(path), "w", options={"movflags": "faststart"})
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options={"crf": "20"})
        self._stream.pix_fmt = "yuv420p"
        self._size = (0, 0)

    def add(self, image: np.ndarray) -> None:
        """A picture (H, W, 3) uint8 RGB; a last odd row or column is repeated, as the format needs even sides."""
        import av
        import numpy as np

        height, width = image.shape[:2]
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._size == (0, 0):
            self._stream.height, self._stream.width = self._size = image.shape[:2]
        assert self._size == image.shape[:2], "pictures of two sizes in one video"
        for packet in self._stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
            self._container.mux(packet)

    def close(self) -> None:
        """Writes what is left; only then is the file whole."""
        if self._size != (0, 0):
            for packet in self._stream.encode():
                self._container.mux(packet)
        self._container.close()
