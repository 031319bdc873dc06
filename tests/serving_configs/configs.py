"""The files under serving_configs/ as compose and Kubernetes would read them, without either."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "serving_configs"
COMPOSE_FILES = sorted(CONFIGS.glob("*/*/compose.yaml"))
LEADER_WORKER_SETS = sorted(CONFIGS.glob("*/*/leaderworkerset.yaml"))
DOCKERFILES = sorted(CONFIGS.rglob("Dockerfile"))

# ${NAME}, ${NAME:-default}, ${NAME:?what is missing}
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@dataclass
class Process:
    """What one container runs."""

    origin: str
    words: list[str]
    environment: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the compose service, or of the Kubernetes container."""

    def options(self) -> dict[str, str]:
        """`--name` and its value, "" where it has none."""
        pairs = (word.partition("=") for word in self.words if word.startswith("--"))
        return {name: value for name, _, value in pairs}

    @property
    def is_check(self) -> bool:
        return self.words[:2] == ["ep-backend", "check"]

    @property
    def engine(self) -> str | None:
        """Whose server it is: "vllm", "sglang" or none."""
        return self.words[0] if self.words[1:2] == ["serve"] else None


def example_environment(folder: Path) -> dict[str, str]:
    """What `.env.example` sets."""
    lines = (folder / ".env.example").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: value for name, value in pairs}


def interpolate(text: str, environment: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name, kind, other = match.groups()
        if name in environment:
            return environment[name]
        assert kind == "-", f"{name} is not set, and has no default"
        return other

    return VARIABLE.sub(value, text)


def services(path: Path, environment: dict[str, str] | None = None) -> dict[str, Process]:
    """The services of a compose file, with the variables of its `.env.example` or these."""
    if environment is None:
        environment = example_environment(path.parent)
    content = yaml.safe_load(interpolate(path.read_text(), environment))
    return {
        name: Process(
            f"{name_of(path)}: {name}",
            [*service["entrypoint"], *service["command"]],
            service.get("environment", {}),
            service,
        )
        for name, service in content["services"].items()
    }


def pod_templates(path: Path) -> dict[str, dict[str, Any]]:
    """The pods of a LeaderWorkerSet file by role."""
    (content,) = (
        document
        for document in yaml.safe_load_all(path.read_text())
        if document["kind"] == "LeaderWorkerSet"
    )
    group = content["spec"]["leaderWorkerTemplate"]
    return {role: group[f"{role}Template"]["spec"] for role in ("leader", "worker")}


def containers(path: Path) -> dict[str, Process]:
    """Of all pods of a LeaderWorkerSet file, init containers first."""
    found = {}
    for role, pod in pod_templates(path).items():
        for container in (*pod["initContainers"], *pod["containers"]):
            environment = {
                variable["name"]: variable["value"] for variable in container.get("env", [])
            }
            words = [*container["command"], *container["args"]]
            words = [word.replace("$(LWS_LEADER_ADDRESS)", "leader.example") for word in words]
            assert not any("$(" in word for word in words)
            name = f"{role}/{container['name']}"
            found[name] = Process(f"{name_of(path)}: {name}", words, environment, container)
    return found


def all_processes() -> list[Process]:
    found: list[Process] = []
    for path in COMPOSE_FILES:
        found += services(path).values()
    for path in LEADER_WORKER_SETS:
        found += containers(path).values()
    return found


def servers_of(engine: str) -> list[Process]:
    return [process for process in all_processes() if process.engine == engine]
