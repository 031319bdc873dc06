"""Configurations of Prometheus and Grafana: they fit together, and name only metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ep_backend.observe.counts import METRICS

OBSERVE = Path(__file__).parent.parent.parent / "serving_configs" / "observe"
DASHBOARD = OBSERVE / "grafana" / "dashboards" / "ep_backend.json"
NAME = r"\b(?:ep_backend_|vllm:|sglang:)\w+"
OURS = {name: metric for metric in METRICS for name in metric.samples}
ENGINES = {
    f"{engine}:{name}_bucket"
    for engine in ("vllm", "sglang")
    for name in ("inter_token_latency_seconds", "time_to_first_token_seconds")
}
"""What a running vLLM is asked for in tests/serving; SGLang calls them the same."""


def panels() -> list[dict[str, Any]]:
    return json.loads(DASHBOARD.read_text())["panels"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_every_metric_of_the_dashboard_exists() -> None:
    named = {name for expr in expressions() for name in re.findall(NAME, expr)}
    assert named <= OURS.keys() | ENGINES
    assert named >= ENGINES, "decode latency is the engine's"
    shown = {OURS[name].name for name in named - ENGINES}
    assert shown == {metric.name for metric in METRICS} - {"ep_backend_forwards"}


def test_labels_of_the_dashboard_are_those_of_its_metrics() -> None:
    for panel in panels():
        for target in panel["targets"]:
            ours = [OURS[n] for n in re.findall(NAME, target["expr"]) if n in OURS]
            labels = {"le"}.union(*(metric.labels for metric in ours))
            grouped = re.findall(r" by \(([^)]*)\)", target["expr"])
            legend = re.findall(r"{{(\w+)}}", target["legendFormat"])
            used = {label.strip() for group in grouped for label in group.split(",")} | {*legend}
            assert used <= labels, target["expr"]


def test_the_promised_panels_are_there() -> None:
    by_title = {panel["title"]: panel for panel in panels()}
    for start, kind in (
        ("Decode latency", "timeseries"),
        ("Share of a step", "timeseries"),
        ("Straggler map", "table"),
        ("Expert imbalance", "timeseries"),
    ):
        (title,) = (title for title in by_title if title.startswith(start))
        assert by_title[title]["type"] == kind
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_parentheses_of_expressions_pair_up() -> None:
    for expr in expressions():
        depth = 0
        for character in expr:
            depth += {"(": 1, ")": -1}.get(character, 0)
            assert depth >= 0, expr
        assert depth == 0, expr


def test_grafana_finds_its_datasource_and_prometheus_its_targets() -> None:
    yaml = pytest.importorskip("yaml")
    (source,) = yaml.safe_load((OBSERVE / "grafana" / "datasources.yaml").read_text())[
        "datasources"
    ]
    uids = {panel["datasource"]["uid"] for panel in panels()}
    assert uids == {source["uid"]}
    services = yaml.safe_load((OBSERVE / "compose.yaml").read_text())["services"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(mapped.endswith(f":{port}") for mapped in services[host]["ports"])
    (job,) = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())["scrape_configs"]
    (file,) = job["file_sd_configs"][0]["files"]
    assert any(volume.endswith(f":{file}:ro") for volume in services[host]["volumes"])
    for path in (OBSERVE / "targets").glob("*.yml"):
        for group in yaml.safe_load(path.read_text()):
            assert all(re.fullmatch(r"[\w.]+:\d+", target) for target in group["targets"])


def test_mounts_and_images_of_the_compose_file() -> None:
    yaml = pytest.importorskip("yaml")
    services = yaml.safe_load((OBSERVE / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), "pinned"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        volumes = [
            v.replace("${OBSERVE_TARGETS:-one-node}", "one-node") for v in service["volumes"]
        ]
        files = [v.split(":-../../observe}")[1] for v in volumes if v.startswith("$")]
        assert files
        for mounted in files:
            assert (OBSERVE / mounted.split(":")[0].strip("/")).exists(), mounted


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is missing")
def test_compose_accepts_it_over_another_file(tmp_path: Path) -> None:
    shutil.copytree(OBSERVE, tmp_path / "observe")
    folder = tmp_path / "engine" / "one-node"
    folder.mkdir(parents=True)
    (folder / "compose.yaml").write_text("services:\n  server:\n    image: busybox:1.36\n")
    files = ("-f", "compose.yaml", "-f", "../../observe/compose.yaml")
    done = subprocess.run(
        ["docker-compose", *files, "config"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/observe/prometheus.yml" in done.stdout
