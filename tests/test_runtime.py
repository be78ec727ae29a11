"""Runtime: devices and threads that do not exist are told in one line; the progress bar can be silent."""

from __future__ import annotations

import pytest
import torch

from pipeline.runtime import Runtime, duration


def test_devices() -> None:
    assert Runtime().torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert Runtime(device="cpu").torch_device() == torch.device("cpu")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used .* --device auto") as caught:
            Runtime(device=device).torch_device()
        assert "\n" not in str(caught.value)


def test_threads() -> None:
    assert Runtime(threads=3).workers == 3
    assert Runtime().workers >= 1
    with pytest.raises(ValueError, match="threads"):
        Runtime(threads=-1)
    before = torch.get_num_threads()
    Runtime(device="cpu", threads=before + 1).torch_device()
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        with Runtime(progress=progress).bar(2, "shard", "img") as bar:
            bar.update(2)
        assert ("shard: 100%" in capsys.readouterr().err) == progress


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.44, "0.4 s"), (9.49, "9.5 s"), (9.5, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"),
        (3599, "59 min 59 s"), (7499, "2 h 04 min"), (90_000, "25 h 00 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
