"""Runtime: devices and threads that do not exist are told in one line; the progress bar can be silent."""

from __future__ import annotations

import pytest
import torch

from pipeline.runtime import Runtime, driver_version, duration


def test_devices() -> None:
    assert Runtime().torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert Runtime(device="cpu").torch_device() == torch.device("cpu")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used .* --device auto") as caught:
            Runtime(device=device).torch_device()
        assert "\n" not in str(caught.value)


def test_a_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what asks for no device, such as Triton's launches; here without the GPUs."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for device in ("cuda:1", "cuda", "cpu"):
        assert Runtime(device=device).torch_device() == torch.device(device)
    assert current == [torch.device("cuda:1")]


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


def test_a_log_file_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """One at the start, one every 10 s of a clock that is moved by hand, and one at the end."""
    now = 0.0
    with Runtime().bar(100, "training v2c", "step") as bar:
        bar._time = lambda: now  # pyright: ignore[reportAttributeAccessIssue]
        bar.start_t = bar.last_print_t = now
        for _ in range(100):
            now += 0.3
            bar.set_postfix({"total": "1.5"}, refresh=False)
            bar.update()
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == "" and not any("\r" in line or line != line.strip() for line in lines)
    assert lines[0].startswith("training v2c: 0%, 0 of 100 [")
    assert [line.partition(" of")[0] for line in lines[1:]] == [
        "training v2c: 34%, 34", "training v2c: 68%, 68", "training v2c: 100%, 100",
    ]  # fmt: skip
    assert lines[1].endswith("[00:10<00:19,  3.33step/s, total=1.5]")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.44, "0.4 s"), (9.49, "9.5 s"), (9.5, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"),
        (3599, "59 min 59 s"), (7499, "2 h 04 min"), (90_000, "25 h 00 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_the_line_about_the_device_says_why_there_is_no_gpu() -> None:
    assert Runtime(device="cpu").device_line() == "device cpu"
    Runtime(device="cpu").require_gpu("this")  # asked for by name
    shown = Runtime().device_line()
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name() in shown and f"CUDA {torch.version.cuda}" in shown
        return
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        torch.cuda.init()
    reason = str(caught.value).split(". ")[0]
    assert shown == f"device cpu, as torch finds no GPU: {reason}"
    with pytest.raises(ValueError, match="^this is made for a GPU, and torch finds none: .*--device cpu") as refused:
        Runtime().require_gpu("this")
    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.07  Sat Feb 17 22:55:48 UTC 2024\nGCC version: 12.3\n", "535.161.07"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@host)\n", "580.95.05"),
        ("", "unknown"),
    ],
)  # fmt: skip
def test_the_version_of_the_driver(text: str, version: str) -> None:
    assert driver_version(text) == version
