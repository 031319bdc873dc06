"""README names nothing that does not exist, and says what the code says."""

from __future__ import annotations

import fnmatch
import re

import torch
from typer.testing import CliRunner

from ep_backend import NetworkConfig
from ep_backend.cli import app
from ep_backend.settings import default_tagged_tokens
from tests.readme.pages import README, README_FLOWING, RESULTS, ROOT, results
from tests.support.shapes import Shape

ROOMS = "csrc|ep_backend|integrations|serving_configs|tests"


def test_every_path_exists() -> None:
    in_backticks = re.findall(rf"`((?:{ROOMS})/[^`\s]*)`", README)
    in_map = re.findall(rf"^((?:{ROOMS})/\S*)", README, re.M)
    below_package = [f"ep_backend/{p}" for p in re.findall(r"^  (\w+(?:/|\.py)) ", README, re.M)]
    paths = in_backticks + in_map + below_package
    assert len(paths) >= 10
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_every_command_exists() -> None:
    commands = {line.split("[")[0].strip() for line in re.findall(r"ep-backend ([a-z -]+)", README)}
    assert commands
    for command in commands:
        words = [word for word in command.split() if not word.startswith("-")]
        result = CliRunner().invoke(app, [*words[:2], "--help"])
        assert result.exit_code == 0, command


def test_every_variable_is_read_somewhere() -> None:
    sources = (
        "".join(
            path.read_text()
            for folder in ("ep_backend", "integrations")
            for path in (ROOT / folder).rglob("*.py")
        )
        + (ROOT / "CMakeLists.txt").read_text()
    )
    variables = set(re.findall(r"`(EP_BACKEND_\w+)`", README))
    assert variables
    assert all(variable in sources for variable in variables)


def test_every_result_is_explained() -> None:
    named = re.findall(r"`([\w*-]+\.json)`", (RESULTS / "README.md").read_text())
    patterns = {name.replace("-N-", "-*-") for name in named}
    files = {path.name for path in RESULTS.glob("*.json")}
    assert files == {file for pattern in patterns for file in fnmatch.filter(files, pattern)}
    assert all(fnmatch.filter(files, pattern) for pattern in patterns)


def test_copies_between_nodes_are_those_of_the_results() -> None:
    copies = {
        case["scheme"]: case["copies_per_token"]
        for case in results("wire-4-nodes.json")["cases"]
        if case["phase"] == "dispatch"
    }
    told = (
        f"{copies['per_node']:.1f} copies cross the network, not {copies['per_rank']:.1f} "
        f"({copies['per_expert']:.0f}, if each expert got one)"
    )
    assert told in README_FLOWING


def test_sizes_are_those_of_the_code() -> None:
    most = [
        default_tagged_tokens(7168, 8, num_ranks, workspaces_of="rank_major", with_hooks=with_hooks)
        for with_hooks in (True, False)
        for num_ranks in (2, 4, 5)
    ]
    told = (
        "Of 7168 channels in float8 that is up to {} tokens between two ranks, {} up to four, {} "
        "between more; up to {}, {} and {} for a buffer"
    )
    assert told.format(*most) in README_FLOWING
    at_home, on_ranks = (num_bytes_over_network(r) >> 20 for r in ("source", "rank"))
    assert f"{at_home} MiB instead of {on_ranks}" in README_FLOWING


def num_bytes_over_network(reduction: str) -> int:
    """Of 16 ranks on hosts of their own, 128 tokens each."""
    shape = Shape(
        16,
        num_max_tokens_per_rank=128,
        hidden=7168,
        num_experts=256,
        top_k=8,
        dispatch_dtype=torch.float8_e4m3fn,
        reduction=reduction,
        device="cuda",
        network=NetworkConfig(),
    )
    return shape.settings().num_symmetric_bytes(shape.layout(), None)
