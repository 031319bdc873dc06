"""The images: pinned, without root, and made of files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.serving_configs.configs import CONFIGS, DOCKERFILES, ROOT, name_of

by_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
# Not pinned by digest: nobody serves from it, it only compiles.
BUILDERS = ("nvidia/cuda:13.0.2-devel-ubuntu22.04",)


def instructions(path: Path) -> list[tuple[str, str]]:
    text = path.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


@by_dockerfile
def test_base_images_are_pinned(path: Path) -> None:
    arguments = dict(
        value.split("=", 1) for name, value in instructions(path) if name == "ARG" and "=" in value
    )
    stages = set()
    for name, value in instructions(path):
        if name != "FROM":
            continue
        image, *alias = value.split()
        image = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], image)
        if image not in stages | set(BUILDERS):
            assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}", image), image
        stages.update(alias[1:])


@by_dockerfile
def test_nothing_serves_as_root(path: Path) -> None:
    users = [value for name, value in instructions(path) if name == "USER"]
    assert users[-1] == "serving"


@by_dockerfile
def test_what_it_installs_exists_and_reaches_the_build(path: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    places = {}
    for name, value in instructions(path):
        if name != "COPY" or value.startswith("--from"):
            continue
        source, target = value.split()
        assert (ROOT / source).exists(), source
        assert source == "." or any(
            source == kept or source.startswith(f"{kept}/")
            for kept in (line[1:] for line in ignored if line.startswith("!"))
        )
        places[target] = ROOT / source
    for name, value in instructions(path):
        if name != "RUN":
            continue
        for target, place in places.items():
            for used in re.findall(rf"(?<=\s){target}(/\S+)?", value):
                assert (place / used.lstrip("/") if used else place).exists(), used


@by_dockerfile
def test_packages_are_pinned(path: Path) -> None:
    """Those of pip; what Debian and Ubuntu install is as fixed as their base image's releases."""
    for name, value in instructions(path):
        if name != "RUN":
            continue
        for step in value.split("&&"):
            if "pip install" not in step:
                continue
            words = step.split()[step.split().index("install") + 1 :]
            named = [w for w in words if re.fullmatch(r"[a-z][\w-]*(==[\w.]+)?", w)]
            assert all("==" in word for word in named), step


def test_the_build_has_what_a_wheel_needs() -> None:
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for path in kept:
        assert (ROOT / path).exists(), path
    pyproject = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'^  "(ep_backend|integrations/\w+)",$', pyproject, re.M)
    assert len(packages) == 3
    needed = {package.split("/")[0] for package in packages}
    needed |= {"pyproject.toml", "CMakeLists.txt", "csrc", "README.md", "LICENSE"}
    assert needed <= set(kept)


def test_lists_of_packages_are_pinned() -> None:
    lists = [path for path in CONFIGS.rglob("*requirements*.txt")]
    assert len(lists) == 3
    for path in lists:
        for line in path.read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[\w.-]+(\[\w+\])?==\S+", line), line
