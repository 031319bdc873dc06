"""What `python -m ep_backend.bench.serve` was asked for."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from ep_backend.bench.model import TinyMoE
from ep_backend.bench.options import without_output

PROGRAM = "ep-backend bench serve"
DEVICES = ("cuda", "cpu")

DEFAULT = "default"
"""All ranks, with the exchange that the engine takes when it is not told. On a CPU it starts and
fails: there our plug-ins supply what it lacks (`cpu_default` of each)."""
SINGLE = "single"
"""One rank, no exchange."""
OURS = "ep_backend_low_latency"
OURS_OF = {"vllm": OURS, "sglang": "ep_backend"}
"""What engines call our backend."""
ENGINES = tuple(OURS_OF)

DEFAULT_CONCURRENCY = {"cuda": (1, 8, 32, 64, 128), "cpu": (1, 4)}
DEFAULT_REPEATS = {"cuda": 3, "cpu": 2}
# At concurrency 1, a request per slot would be measured by itself.
MIN_PROMPTS = 8
NUM_WARMUP_TOKENS = 32


@dataclass(frozen=True)
class Round:
    """One measurement, or a round to warm up: a request a slot, short answers."""

    concurrency: int
    num_prompts: int
    num_output_tokens: int
    seed: int
    """All backends get the same prompts, every measurement others."""


@dataclass(frozen=True)
class Visit:
    """One server from start to end, and the repeats that it answers."""

    backend: str
    number: int
    """Counts the servers of this backend."""
    repeats: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.number}"


@dataclass(frozen=True)
class Options:
    command: str
    device: str = "cuda"
    engine: str = "vllm"
    num_ranks: int = 2
    model: Path | None = None
    """None: a random one is written, and removed in the end."""
    backends: tuple[str, ...] = (DEFAULT, OURS)
    """`DEFAULT`, `SINGLE`, or a name for vLLM's --all2all-backend or SGLang's --moe-a2a-backend;
    the first is what the others are compared with."""
    urls: dict[str, str] = field(default_factory=dict)
    """Of backends whose servers run already."""
    concurrency: tuple[int, ...] = DEFAULT_CONCURRENCY["cuda"]
    repeats: int = 3
    prompts_per_slot: int = 4
    num_input_tokens: int = 64
    num_output_tokens: int = 128
    max_num_batched_tokens: int | None = None
    """Of every backend. None: the engine's default, on a CPU 256."""
    environment: dict[str, str] = field(default_factory=dict)
    server_arguments: tuple[str, ...] = ()
    alternate: bool = True
    """Servers are started again for every repeat, in turn, against slow drift."""
    trace: bool = False
    """Workers record their operations, for the share of a step that is exchange."""
    profile: tuple[int, ...] = ()
    """Concurrencies at which a server of each backend has its kernels profiled."""
    limit_secs: float = 1800.0
    resume: bool = False
    output: Path = Path("build/serve/result.json")

    def visits(self) -> list[Visit]:
        """In the order in which they happen."""
        if not self.alternate:
            return [Visit(backend, 0, tuple(range(self.repeats))) for backend in self.backends]
        return [
            Visit(backend, repeat, (repeat,))
            for repeat in range(self.repeats)
            for backend in self.backends
        ]

    def is_profiled(self, visit: Visit) -> bool:
        """Whether the server's kernels are profiled once it has been measured: of the first; of one
        that goes on running the last time. A graph of 1300 kernels took 8 us to launch before its
        process was profiled, and 354 us ever after (PyTorch 2.11, an H200)."""
        last = self.visits()[-1].number
        return len(self.profile) > 0 and visit.number == (last if visit.backend in self.urls else 0)

    def num_prompts(self, concurrency: int) -> int:
        return max(MIN_PROMPTS, concurrency * self.prompts_per_slot)

    def round(self, concurrency: int, repeat: int | None) -> Round:
        """Repeat None: a round to warm up."""
        num_tokens = self.num_output_tokens
        if repeat is None:
            num_tokens = min(num_tokens, NUM_WARMUP_TOKENS)
            return Round(concurrency, concurrency, num_tokens, 1000 * concurrency + 999)
        num_prompts = self.num_prompts(concurrency)
        return Round(concurrency, num_prompts, num_tokens, 1000 * concurrency + repeat)

    def beside(self, name: str) -> Path:
        """A file that goes with the output."""
        return self.output.with_name(f"{self.output.stem}-{name}")

    def log(self, name: str) -> Path:
        return self.beside(f"{name}.log")


def parse_arguments(arguments: list[str]) -> Options:
    """Wrong arguments end the program with status 2, as argparse does."""
    parser = _parser()
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    device = given.setdefault("device", Options.device)
    engine = given.setdefault("engine", Options.engine)
    given["urls"] = dict(given.pop("urls", []))
    given.setdefault("backends", tuple(given["urls"]) or (DEFAULT, OURS_OF[engine]))
    given.setdefault("concurrency", DEFAULT_CONCURRENCY[device])
    given.setdefault("repeats", DEFAULT_REPEATS[device])
    # On GPUs, graphs replay the exchange: no trace sees it.
    given.setdefault("trace", device == "cpu" and not given["urls"])
    given["environment"] = dict(given.pop("environment", []))
    given["server_arguments"] = tuple(shlex.split(given.pop("server_arguments", "")))
    options = Options(shlex.join([*PROGRAM.split(), *without_output(arguments)]), **given)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: Options) -> None:
    for flag, value in (
        ("--ranks", options.num_ranks - 1),
        ("--repeats", options.repeats),
        ("--prompts-per-slot", options.prompts_per_slot),
        ("--input-tokens", options.num_input_tokens),
        ("--output-tokens", options.num_output_tokens - 1),
        ("--concurrency", min(options.concurrency)),
        ("--profile", min(options.profile, default=1)),
    ):
        if value < 1:
            least = 2 if flag in ("--ranks", "--output-tokens") else 1
            parser.error(f"{flag} must be at least {least}")
    if len(set(options.backends)) != len(options.backends):
        parser.error(f"--backends names one twice: {','.join(options.backends)}")
    if options.profile and options.device != "cuda":
        parser.error("--profile looks at kernels on a GPU")
    if options.model is not None and not (options.model / "config.json").exists():
        parser.error(f"--model {options.model} has no config.json")
    if options.urls and options.model is None:
        parser.error("--url needs --model: the checkpoint that the running servers have loaded")
    if options.urls and options.profile and options.engine == "vllm":
        parser.error("--profile starts its servers: vLLM's are told then where traces go; no --url")
    if stray := set(options.urls) - set(options.backends):
        parser.error(f"--url is given for {', '.join(sorted(stray))}, not among --backends")
    num_heads, num_ranks = TinyMoE().num_kv_heads, options.num_ranks
    is_tiny = options.model is None and options.device == "cpu"
    if is_tiny and options.engine == "sglang" and num_heads % num_ranks != 0:
        parser.error(
            f"--ranks is {num_ranks}, but the tiny model has {num_heads} key heads, which SGLang "
            "shares out on a CPU; give another --model (ep-backend make-model writes one)"
        )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        # They become parts of file names and of a command line.
        if not re.fullmatch(r"\w+", name):
            raise argparse.ArgumentTypeError(f"{name!r} is not a backend's name")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers such as 1,8,32") from None


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Latency and throughput of an inference server, by all-to-all backend.",
    )
    add = parser.add_argument
    add(
        "--engine",
        choices=ENGINES,
        help="Measured by its own benchmark: `vllm bench serve`, `sglang.bench_serving`. "
        "[default: vllm]",
    )
    add("--device", choices=DEVICES, help="[default: cuda]")
    add("--ranks", dest="num_ranks", type=int, help="Data-parallel ranks. [default: 2]")
    add("--model", type=Path, help="A checkpoint. [default: a random Qwen3-MoE]")
    add(
        "--backends",
        type=_names,
        help=f"{DEFAULT}, {SINGLE} (one rank) or names for vLLM's --all2all-backend or SGLang's "
        f"--moe-a2a-backend; the first is the reference. [default: {DEFAULT} and ours]",
    )
    add(
        "--url",
        dest="urls",
        type=_variable,
        action="append",
        metavar="BACKEND=URL",
        help="A server that runs already, with --model, and serves with this backend: it is "
        "measured as it is. May be repeated; --backends is then by default those.",
    )
    add(
        "--concurrency",
        type=_numbers,
        help="Requests in flight; swept. [default: 1,8,32,64,128; on a CPU 1,4]",
    )
    add("--repeats", type=int, help="Sweeps by each backend. [default: 3, on a CPU 2]")
    add(
        "--prompts-per-slot",
        type=int,
        help=f"Requests = this x concurrency, at least {MIN_PROMPTS}. [default: 4]",
    )
    add("--input-tokens", dest="num_input_tokens", type=int, help="[default: 64]")
    add("--output-tokens", dest="num_output_tokens", type=int, help="[default: 128]")
    add(
        "--max-num-batched-tokens",
        type=int,
        help="Of every backend. [default: the engine's, on a CPU 256]",
    )
    add(
        "--alternate",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Start servers again for every repeat, in turn, against slow drift; or each once. "
        "[default: --alternate]",
    )
    add(
        "--trace",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Let workers record their operations, to tell the share of a step that is exchange; "
        "on GPUs only what runs outside of graphs. [default: on a CPU]",
    )
    add(
        "--profile",
        type=_numbers,
        help="Concurrencies, such as 1,64: after its sweep the first server of each backend, "
        "or the one that runs already, is profiled there for a moment: what a step's kernels take. "
        "On GPUs.",
    )
    add(
        "--env",
        dest="environment",
        type=_variable,
        action="append",
        metavar="NAME=VALUE",
        help="For servers and the client; may be repeated.",
    )
    add("--server-arguments", help="More arguments of every server, as one word.")
    add(
        "--limit",
        dest="limit_secs",
        type=float,
        help="Seconds; then the servers are ended, which takes up to 20 s more, and what was "
        "measured is written. [default: 1800]",
    )
    add(
        "--resume",
        action="store_const",
        const=True,
        help="Measure what is missing in --output, under the same settings.",
    )
    add(
        "--output",
        "--json",
        type=Path,
        help="JSON; the report (HTML), its charts (PNG) and logs go beside it. "
        "[default: build/serve/result.json]",
    )
    return parser
