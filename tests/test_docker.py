"""The container files, as far as that can be told without Docker: what they name is there, pinned, private, and fits
together.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMPOSE, REMOTE = (yaml.safe_load((ROOT / "docker" / name).read_text()) for name in ("compose.yaml", "remote.yaml"))
SERVICES: dict[str, Any] = COMPOSE["services"]
EVERY = [
    pytest.param(file, name, id=f"{file['name']} {name}") for file in (COMPOSE, REMOTE) for name in file["services"]
]
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize(("file", "name"), EVERY)
def test_a_service_waits_for_what_is_there_and_says_when_it_is_ready(file: dict[str, Any], name: str) -> None:
    service = file["services"][name]
    for other, how in service.get("depends_on", {}).items():
        needed = file["services"][other]
        assert not needed.get("profiles"), f"{other} does not run without a profile"
        assert ("healthcheck" in needed) == (how["condition"] == "service_healthy")
        assert (needed.get("restart") == "no") == (how["condition"] == "service_completed_successfully")
    assert "healthcheck" in service or service["restart"] == "no"
    mounts = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume) for volume in service.get("volumes", [])]
    assert {mount.split(":")[0] for mount in mounts} <= file["volumes"].keys()


@pytest.mark.parametrize(("file", "name"), EVERY)
def test_images_are_pinned_ports_are_local_and_no_secret_is_written_down(file: dict[str, Any], name: str) -> None:
    service = file["services"][name]
    tag = r"\d+\.\d+-\w+|RELEASE\.[\dTZ-]+"
    assert service["image"] == f"zs-seg:{VERSION}" or re.fullmatch(rf"[\w./]+:({tag})", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    secrets = [
        value for key, value in service.get("environment", {}).items() if re.search("PASSWORD|KEY|ROOT_USER", key)
    ]
    assert all(re.match(r"\$\{\w+:\?set ", value) for value in secrets)


def test_machines_without_a_shared_disk_share_the_remote_alone() -> None:
    """Every service that is of the project has the remote's address and credentials; no folder is that of two. The run's
    command is one of `zs-seg`, with the remote and the cluster of this file."""
    services = REMOTE["services"]
    ours = {name: service for name, service in services.items() if service["image"].startswith("zs-seg:")}
    for service in ours.values():
        given = service["environment"]
        assert (
            given["AWS_ENDPOINT_URL"] == "http://minio:9000"
            and {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= given.keys()
        )
    volumes = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    assert len(volumes) == len(set(volumes))
    assert "store:/artifacts" in services["run"]["volumes"]
    options, unknown = cli.parser().parse_known_args(services["run"]["command"])
    assert not unknown and options.push and options.command == "run"
    assert options.dask == services["dask-worker-1"]["entrypoint"][2] == "tcp://dask-scheduler:8786"
    bucket = re.search(r"makedirs\('([^']+)'", services["bucket"]["entrypoint"][-1])
    assert bucket and options.remote.startswith(f"s3://{bucket[1]}/")
    assert {"dask-worker-1", "dask-worker-2", "bucket"} == services["run"]["depends_on"].keys()


def test_everything_that_works_on_artefacts_shares_the_store() -> None:
    for name in ("worker", "worker-gpu", "dask-worker", "dask-worker-gpu"):
        assert "store:/artifacts" in SERVICES[name]["volumes"]
    for name in ("worker", "dask-worker"):
        gpu = SERVICES[f"{name}-gpu"]
        assert gpu["profiles"] == ["gpu"] and SERVICES[name]["profiles"] == ["cpu"]
        assert {**gpu, "profiles": ["cpu"]} == {**SERVICES[name], "deploy": gpu["deploy"]}


def test_the_image_is_made_from_the_lock_first_and_the_source_last_and_runs_as_nobody_special() -> None:
    words = [word for word, _ in INSTRUCTIONS]
    assert not [rest for word, rest in INSTRUCTIONS if word == "FROM" and ("latest" in rest or ":" not in rest)]
    copied = [rest for word, rest in INSTRUCTIONS if word == "COPY"]
    assert copied[0].split()[0] == "requirements-remote.lock" and copied[-1] == ". ."
    assert "RUN" not in words[len(words) - words[::-1].index("COPY") :], "a step after the source runs at every change"
    assert dict(INSTRUCTIONS)["USER"] == "1000:1000"
    assert "--require-hashes" in (ROOT / "docker/Dockerfile").read_text()
    uv = re.search(r"UV_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert uv and f"uv=={uv[1]}" in (ROOT / "docker/Dockerfile").read_text()


def test_the_final_image_has_what_triton_compiles_with() -> None:
    stages = [i for i, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM"]
    installed = " ".join(
        rest for word, rest in INSTRUCTIONS[stages[-1] :] if word == "RUN" and "apt-get install" in rest
    )
    assert {"gcc", "libc6-dev"} <= {package.partition("=")[0] for package in installed.split()}


def test_the_image_gets_the_source_and_nothing_else() -> None:
    kept = [line[1:] for line in _lines(".dockerignore") if line.startswith("!")]
    assert _lines(".dockerignore")[0] == "*"
    assert all((ROOT / name).exists() for name in kept)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*packages["only-include"], "requirements-remote.lock", "prefect.yaml"} <= set(kept)
    assert "requirements-dev.lock" not in kept
    assert not [name for name in kept if fnmatch.fnmatch(name, ".*") or name in ("artifacts", "runs", "tests")]


def _lines(suffix: str) -> list[str]:
    text = (ROOT / f"docker/Dockerfile{suffix}").read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]
