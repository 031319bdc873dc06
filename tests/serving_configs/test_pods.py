"""The LeaderWorkerSet: what compose's rules are for Kubernetes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.serving_configs.configs import (
    LEADER_WORKER_SETS,
    containers,
    name_of,
    pod_templates,
    services,
)

by_file = pytest.mark.parametrize("path", LEADER_WORKER_SETS, ids=name_of)


def test_there_is_one() -> None:
    assert [name_of(path) for path in LEADER_WORKER_SETS] == ["vllm/wide-ep/leaderworkerset.yaml"]


@by_file
def test_commands_are_those_of_the_compose_file(path: Path) -> None:
    """But for addresses, and the host that only the host's network needs."""
    own = {"--host", "--port", "--data-parallel-address"}

    def options(process_options: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in process_options.items() if name not in own}

    pods, hosts = containers(path), services(path.parent / "compose.yaml")
    for pod, host in (("leader", "head"), ("worker", "worker")):
        assert options(pods[f"{pod}/server"].options()) == options(hosts[host].options())
        assert pods[f"{pod}/check"].words == hosts["check"].words


@by_file
def test_a_group_has_as_many_pods_as_hosts(path: Path) -> None:
    (group,) = (d for d in yaml.safe_load_all(path.read_text()) if d["kind"] == "LeaderWorkerSet")
    leader = containers(path)["leader/server"].options()
    num_pods = int(leader["--data-parallel-size"]) // int(leader["--data-parallel-size-local"])
    assert group["spec"]["leaderWorkerTemplate"]["size"] == num_pods
    worker = containers(path)["worker/server"].options()
    assert worker["--data-parallel-start-rank"] == leader["--data-parallel-size-local"]


@by_file
def test_least_privilege(path: Path) -> None:
    for pod in pod_templates(path).values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostIPC", "hostPID"} & set(pod)
    for name, container in containers(path).items():
        context = container.settings["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"]["drop"] == ["ALL"]
        is_server = name.endswith("/server")
        assert context["capabilities"].get("add", []) == (["IPC_LOCK"] if is_server else [])
        assert container.settings["resources"]["limits"]["nvidia.com/gpu"] == 8


@by_file
def test_probes_and_service_are_those_of_the_leader(path: Path) -> None:
    (service,) = (d for d in yaml.safe_load_all(path.read_text()) if d["kind"] == "Service")
    (port,) = service["spec"]["ports"]
    assert service["spec"]["selector"]["role"] == "leader"
    leader, worker = (containers(path)[f"{role}/server"].settings for role in ("leader", "worker"))
    assert leader["ports"] == [{"containerPort": port["targetPort"]}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert leader[probe]["httpGet"] == {"path": "/health", "port": port["targetPort"]}
        assert probe not in worker, "a headless vLLM answers nobody"
