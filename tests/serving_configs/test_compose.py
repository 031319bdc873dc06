"""The compose files: valid, and what they say in several places agrees."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serving_configs.configs import (
    COMPOSE_FILES,
    CONFIGS,
    VARIABLE,
    Process,
    example_environment,
    name_of,
    services,
)

PROFILES = ("prefill", "decode", "router", "head", "worker")
by_file = pytest.mark.parametrize("path", COMPOSE_FILES, ids=name_of)
ALL_SERVICES = [service for path in COMPOSE_FILES for service in services(path).values()]
by_service = pytest.mark.parametrize("service", ALL_SERVICES, ids=lambda service: service.origin)
SERVERS = [service for service in ALL_SERVICES if service.engine]
by_server = pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.origin)

DOCKER_COMPOSE = shutil.which("docker-compose")
needs_docker_compose = pytest.mark.skipif(
    DOCKER_COMPOSE is None,
    reason="docker-compose is not installed (apt-get install docker-compose): compose files were "
    "only checked by the rules of this file",
)


def test_every_engine_has_every_configuration() -> None:
    folders = {name_of(path.parent) for path in COMPOSE_FILES}
    kinds = ("one-node", "prefill-decode", "wide-ep", "cpu")
    assert folders == {f"{engine}/{kind}" for engine in ("vllm", "sglang") for kind in kinds}


def validate(path: Path) -> subprocess.CompletedProcess[str]:
    assert DOCKER_COMPOSE is not None
    command = [DOCKER_COMPOSE, "--env-file", ".env.example", "-f", path.name]
    for profile in PROFILES:
        command += ["--profile", profile]
    kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [*command, "config", "--quiet"], cwd=path.parent, env=kept, capture_output=True, text=True
    )


@needs_docker_compose
@by_file
def test_docker_compose_takes_it(path: Path) -> None:
    done = validate(path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warning, of a variable that is not set for example"


@needs_docker_compose
@by_file
def test_docker_compose_refuses_a_misspelt_key(path: Path, tmp_path: Path) -> None:
    shutil.copy(path.parent / ".env.example", tmp_path)
    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace("    healthcheck:", "    healthchek:", 1))
    done = validate(copy)
    assert done.returncode != 0
    assert "healthchek" in done.stderr


@by_file
def test_variables_are_those_of_the_example(path: Path) -> None:
    used = {match[1] for match in VARIABLE.finditer(path.read_text())}
    given = example_environment(path.parent)
    assert used == set(given) - {"COMPOSE_PROJECT_NAME"}
    defaults = {m[1]: m[3] for m in VARIABLE.finditer(path.read_text()) if m[2] == "-"}
    assert defaults == {name: given[name] for name in defaults}


def test_projects_have_names_of_their_own() -> None:
    """Volumes are called after them."""
    names = [example_environment(path.parent)["COMPOSE_PROJECT_NAME"] for path in COMPOSE_FILES]
    assert len(set(names)) == len(names)


@by_service
def test_least_privilege(service: Process) -> None:
    assert service.settings["cap_drop"] == ["ALL"]
    assert service.settings["security_opt"] == ["no-new-privileges:true"]
    allowed = {
        "image",
        "build",
        "init",
        "cap_drop",
        "security_opt",
        "deploy",
        "profiles",
        "restart",
    }
    allowed |= {"entrypoint", "command", "environment", "volumes", "ports", "network_mode"}
    allowed |= {"devices", "ulimits", "shm_size", "mem_limit", "stop_grace_period", "healthcheck"}
    allowed |= {"depends_on", "working_dir"}
    assert set(service.settings) <= allowed, "neither privileged, cap_add, ipc, pid nor user"
    for volume in service.settings.get("volumes", []):
        source = volume.split(":")[0]
        assert not source.startswith("/") or volume.endswith(":ro"), "of the host, only to read"


@by_service
def test_a_container_serves_and_is_watched_or_runs_once(service: Process) -> None:
    runs_once = service.words[0] == "ep-backend"
    assert service.settings["restart"] == ("no" if runs_once else "unless-stopped")
    assert runs_once == ("healthcheck" not in service.settings)


@by_service
def test_images_are_built_here_under_a_fixed_tag(service: Process) -> None:
    image, build = service.settings["image"], service.settings["build"]
    assert re.fullmatch(r"ep-backend-[a-z-]+:\d+\.\d+\.\d+", image)
    assert (CONFIGS.parent / build["dockerfile"]).is_file()
    assert build["context"] == "../../.."


def default_address(service: Process) -> tuple[str, str]:
    """Of the server of this container, with its options."""
    options = service.options()
    host, port = {
        "vllm": ("0.0.0.0", "8000"),
        "sglang": ("127.0.0.1", "30000"),
        "vllm-router": ("127.0.0.1", "30000"),
        "python": ("0.0.0.0", "30000"),  # of sglang_router
    }[service.words[0]]
    return options.get("--host", host), options.get("--port", port)


@by_service
def test_ports_and_health_checks_are_those_of_the_command(service: Process) -> None:
    if "healthcheck" not in service.settings:
        return
    if "--headless" in service.words:
        assert service.settings["healthcheck"] == {"disable": True}
        assert "ports" not in service.settings
        return
    host, port = default_address(service)
    (url,) = re.findall(r"http://[^']+", service.settings["healthcheck"]["test"][-1])
    asked = "127.0.0.1" if host == "0.0.0.0" else host
    assert url == f"http://{asked}:{port}/health"
    if service.settings.get("network_mode") == "host":
        assert "ports" not in service.settings
        assert host != "0.0.0.0", "in the host's network there is no port mapping to hide behind"
    else:
        (mapping,) = service.settings["ports"]
        assert mapping == f"127.0.0.1:8000:{port}"
        assert host == "0.0.0.0"


def num_ranks(server: Process) -> int:
    options = server.options()
    if server.engine == "sglang":
        assert options["--tp-size"] == options["--dp-size"]
        return int(options["--tp-size"])
    return int(options["--data-parallel-size"])


def num_hosts(server: Process) -> int:
    options = server.options()
    if server.engine == "sglang":
        return int(options.get("--nnodes", 1))
    local = options.get("--data-parallel-size-local", options["--data-parallel-size"])
    return num_ranks(server) // int(local)


def kernels(server: Process) -> str:
    """Those that need most: where there are normal kernels, there are low-latency ones."""
    options = server.options()
    if server.engine == "sglang":
        assert options["--moe-a2a-backend"] == "ep_backend"
        return "low-latency" if options["--deepep-mode"] == "low_latency" else "normal"
    backend = options["--all2all-backend"]
    return {"ep_backend_low_latency": "low-latency", "ep_backend_high_throughput": "normal"}[
        backend
    ]


@by_server
def test_a_server_waits_for_a_check_of_what_it_needs(server: Process) -> None:
    path = CONFIGS / server.origin.split(": ")[0]
    checks = [
        service
        for name, service in services(path).items()
        if name in server.settings["depends_on"] and service.is_check
    ]
    (check,) = checks
    conditions = [wait["condition"] for wait in server.settings["depends_on"].values()]
    assert set(conditions) == {"service_completed_successfully"}
    assert set(server.settings.get("profiles", [])) <= set(check.settings.get("profiles", []))

    options = check.options()
    assert int(options.get("--hosts", 1)) == num_hosts(server)
    assert options["--kernels"] == kernels(server)
    if path.parent.name == "cpu":
        assert options["--device"] == "cpu"
        assert "deploy" not in server.settings
        return
    assert options["--device"] == "cuda"
    for container in (check, server):
        (gpus,) = container.settings["deploy"]["resources"]["reservations"]["devices"]
        assert gpus == {"driver": "nvidia", "count": 8, "capabilities": ["gpu"]}
    assert int(options["--gpus"]) == 8
    assert num_ranks(server) == 8 * num_hosts(server)


@by_server
def test_nics_come_with_locked_memory(server: Process) -> None:
    has_nics = "/dev/infiniband:/dev/infiniband" in server.settings.get("devices", [])
    assert has_nics == (server.settings.get("ulimits") == {"memlock": -1})
    assert has_nics == (server.settings.get("network_mode") == "host")


def test_ranks_of_one_server_get_the_same_options() -> None:
    """A wide server's head and worker differ in what only one of them has."""
    own = {"--host", "--port", "--api-server-count", "--served-model-name", "--headless"}
    own |= {"--data-parallel-start-rank", "--node-rank"}
    for engine in ("vllm", "sglang"):
        both = services(CONFIGS / engine / "wide-ep" / "compose.yaml")
        head, worker = (
            {name: value for name, value in both[role].options().items() if name not in own}
            for role in ("head", "worker")
        )
        assert head == worker


@by_file
def test_every_flag_has_its_reason(path: Path) -> None:
    for file in (path, path.parent / "leaderworkerset.yaml"):
        if not file.exists():
            continue
        flags = [line for line in file.read_text().splitlines() if re.match(r" +- '?--", line)]
        assert flags
        bare = [line for line in flags if "  # " not in line and "--model-path=" not in line]
        assert not bare


@by_file
def test_the_readme_says_first_what_is_not_there(path: Path) -> None:
    readme = (path.parent / "README.md").read_text()
    state = readme.split("\n\n")[1]
    assert state.startswith("**State.** ")
    checks = [service.options() for service in services(path).values() if service.is_check]
    if any(int(options.get("--hosts", 1)) > 1 for options in checks):
        assert re.search(r"Not possible yet|Never run", state)
        assert "RDMA" in state
    elif any(options["--device"] == "cuda" for options in checks):
        assert "not run" in state, "nobody has started these containers on 8 GPUs"
