"""`ep-backend`: the demo, the benchmarks, their report, the model they use, checks of a machine."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

from ep_backend.bench import (
    decode,
    observe_cost,
    op,
    op_cuda,
    op_cuda_normal,
    precision,
    serve,
    tune,
    wire,
)
from ep_backend.bench.demo import DemoSettings, Progress, ServerFailed, run_demo
from ep_backend.bench.demo_engines import ENGINES
from ep_backend.bench.demo_report import plot_latencies, print_report
from ep_backend.bench.model import TinyMoE, make_model
from ep_backend.bench.report import NoResult, bundled_results, write_report
from ep_backend.bench.server import end_by_signals
from ep_backend.doctor.report import examine, print_examination
from ep_backend.network import VARIABLE, NetworkConfig
from ep_backend.observe import perfetto
from ep_backend.observe.scrape import ScrapeFailed, endpoint_urls
from ep_backend.observe.top import show
from ep_backend.preflight import KERNELS, REDUCTIONS, NotDeployable
from ep_backend.preflight import check as preflight
from ep_backend.settings import check_choice

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
bench = typer.Typer(no_args_is_help=True, help="Benchmarks; each checks its results first.")
app.add_typer(bench, name="bench")
trace = typer.Typer(
    no_args_is_help=True, help="Traces that ranks have recorded (EP_BACKEND_TRACE)."
)
app.add_typer(trace, name="trace")
bench.command()(precision.precision)
bench.command()(wire.wire)
# `bench op` parses only --device and --kind itself: what it measures has options of its own.
op_cpu = typer.Typer(pretty_exceptions_enable=False)
op_cpu.command()(op.op)
op_cpu_normal = typer.Typer(pretty_exceptions_enable=False)
op_cpu_normal.command()(op.op_normal)

MODES_HELP = "; ".join(f"{name}: {', '.join(engine.modes)}" for name, engine in ENGINES.items())
Experts = Annotated[int, typer.Option(min=1, help="Routed experts a layer.")]
TopK = Annotated[int, typer.Option(min=1, help="Experts a token.")]
Layers = Annotated[int, typer.Option(min=1)]
Hidden = Annotated[int, typer.Option(min=64, help="A multiple of 64.")]
Seed = Annotated[int, typer.Option()]


@bench.command(
    "op",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def op_command(
    context: typer.Context,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    kind: Annotated[str, typer.Option(help="low-latency or normal")] = "low-latency",
) -> None:
    """Time of dispatch + combine: processes on the CPU, or virtual ranks on a GPU."""
    on_cpu = {"low-latency": op_cpu, "normal": op_cpu_normal}
    on_cuda = {"low-latency": op_cuda, "normal": op_cuda_normal}
    if kind not in on_cpu:
        raise typer.BadParameter(f"kind is {kind!r}, expected {' or '.join(on_cpu)}")
    if device == "cuda":
        raise typer.Exit(on_cuda[kind].main(context.args))
    if device != "cpu":
        raise typer.BadParameter(f"device is {device!r}, expected cpu or cuda")
    command = typer.main.get_command(on_cpu[kind])
    command.main(context.args, prog_name="ep-backend bench op")


@bench.command(
    "serve",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve_command(context: typer.Context) -> None:
    """Latency of a served model, by all-to-all backend."""
    raise typer.Exit(serve.main(context.args))


@bench.command(
    "decode",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def decode_command(context: typer.Context) -> None:
    """Time of a decode step's MoE layers, without an engine."""
    raise typer.Exit(decode.main(context.args))


@app.command(
    "tune",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def tune_command(context: typer.Context) -> None:
    """Searches settings for a shape on this machine; buffers then take them."""
    raise typer.Exit(tune.main(context.args))


@app.command("doctor")
def doctor_command(
    config: Annotated[
        str, typer.Option(help="What is to run: cpu, cuda (GPUs of this host), rdma (hosts).")
    ] = "cpu",
    ranks: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks.")] = 2,
    ranks_per_host: Annotated[
        int | None, typer.Option(min=1, help="Default: all on this host.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What runs here, over which links, and what is missing. Status 1: the config cannot run."""
    try:
        examination = examine(config, ranks, ranks if ranks_per_host is None else ranks_per_host)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e
    if as_json:
        typer.echo(json.dumps(examination.to_json(), indent=2))
    else:
        print_examination(examination, Console())
    raise typer.Exit(0 if examination.can_run else 1)


@app.command("network")
def network_command(
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="NAME=VALUE of NetworkConfig; default: EP_BACKEND_NETWORK."),
    ] = None,
    kernels: Annotated[str, typer.Option(help=", ".join(KERNELS))] = KERNELS[0],
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="num_max_tokens_per_rank of the largest buffer; of normal ones, "
            "num_tokens_per_round.",
        ),
    ] = 128,
    banks: Annotated[int, typer.Option(min=2, help="Its num_banks.")] = 2,
) -> None:
    """What settings of the network mean to NVSHMEM: its variables, and advice."""
    text = " ".join(settings) if settings else os.environ.get(VARIABLE, "")
    try:
        check_choice("kernels", kernels, dict.fromkeys(KERNELS))
        config = NetworkConfig.parse(text)
        required = config.environment(kernels.replace("-", "_"), max_tokens, banks)
    except (TypeError, ValueError) as e:
        raise typer.BadParameter(str(e)) from e
    for variable, value in required.items():
        typer.echo(f"{variable}={value}")
    for advice in config.advice():
        typer.echo(f"# {advice}")


@app.command("check")
def check_command(
    hosts: Annotated[int, typer.Option(min=1, help="Hosts of one expert-parallel group.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of this host, with --device cuda.")] = 1,
    kernels: Annotated[str, typer.Option(help=", ".join(KERNELS))] = KERNELS[0],
    reduction: Annotated[
        str, typer.Option(help="Where rows are added up: rank (engines) or source (DeepEP).")
    ] = REDUCTIONS[0],
) -> None:
    """Whether this machine can do what a deployment will ask of it; deployments run it first."""
    try:
        typer.echo(
            preflight(
                num_hosts=hosts,
                device=device,
                num_gpus=gpus,
                kernels=kernels,
                reduction=reduction,
            )
        )
    except NotDeployable as e:
        typer.echo(f"not deployable: {e}", err=True)
        raise typer.Exit(1) from e


@app.command("report")
def report_command(
    results: Annotated[
        list[Path] | None, typer.Argument(help="JSON of benchmarks and of the demo.")
    ] = None,
    output: Annotated[Path, typer.Option(help="HTML.")] = Path("build/report.html"),
    bundled: Annotated[
        bool, typer.Option(help="Also those that come with ep_backend, behind the given ones.")
    ] = True,
) -> None:
    """Merges results of benchmarks into one page, which needs no network."""
    paths = [*(results or []), *(bundled_results() if bundled else [])]
    if not paths:
        raise typer.BadParameter("no results are given, and none are bundled")
    try:
        sections = write_report(output, paths)
    except NoResult as e:
        raise typer.BadParameter(str(e)) from e
    num_charts = sum(len(section.charts) for section in sections)
    typer.echo(f"wrote {output}: {len(sections)} results, {num_charts} charts")


@bench.command("observe")
def observe_command(
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each kind of run.")] = 5.0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the result here.")
    ] = None,
) -> None:
    """What metrics cost an operation on this CPU."""
    cost = observe_cost.measure(seconds)
    observe_cost.print_cost(cost, Console())
    if json_path is not None:
        json_path.write_text(json.dumps(cost.as_json(), indent=2) + "\n")


@app.command()
def top(
    endpoints: Annotated[
        list[str] | None,
        typer.Argument(help="HOST:PORT or URL of ranks, or of the engine. Default: localhost:8000"),
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="As many ports from each endpoint's on: one a rank.")
    ] = 1,
    once: Annotated[bool, typer.Option("--once", help="All since the start; then exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Who waits for whom, and which experts are hot: of running ranks, from their metrics."""
    try:
        show(endpoint_urls(endpoints or ["localhost:8000"], ranks), once=once, interval=interval)
    except ScrapeFailed as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(1) from e
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@trace.command("merge")
def trace_merge_command(
    directory: Annotated[Path, typer.Argument(help="Where ranks recorded.")],
    max_spans: Annotated[
        int, typer.Option(min=1, help="The newest of all ranks together.")
    ] = perfetto.MAX_SPANS,
) -> None:
    """Makes DIRECTORY/trace.json of all ranks' recordings, for ui.perfetto.dev."""
    try:
        path = perfetto.write_json(directory, max_spans)
    except FileNotFoundError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(1) from e
    typer.echo(f"wrote {path}; open it at https://ui.perfetto.dev")


@app.command("make-model")
def make_model_command(
    directory: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    experts: Experts = 8,
    top_k: TopK = 2,
    layers: Layers = 2,
    hidden: Hidden = 128,
    seed: Seed = 0,
) -> None:
    """Writes a tiny Qwen3-MoE checkpoint with random weights and a byte-level tokenizer."""
    shape = _shape(layers, hidden, experts, top_k, seed)
    typer.echo(f"wrote {make_model(directory, shape)}")


@app.command()
def demo(
    engine: Annotated[str, typer.Option(help=", ".join(ENGINES))] = "vllm",
    mode: Annotated[str, typer.Option(help=MODES_HELP)] = "low-latency",
    ranks: Annotated[int, typer.Option(min=2, help="Expert-parallel ranks.")] = 2,
    prompts: Annotated[int, typer.Option(min=2)] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Greedy tokens a prompt.")] = 32,
    output: Annotated[Path, typer.Option(help="Logs, model, plot, report.")] = Path("build/demo"),
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the result here.")
    ] = None,
    experts: Experts = 8,
    top_k: TopK = 2,
    layers: Layers = 2,
    hidden: Hidden = 128,
    seed: Seed = 0,
    fault: Annotated[
        str | None, typer.Option(help="Break ep_backend on purpose; the demo must fail.")
    ] = None,
) -> None:
    """Serves a tiny MoE model with a real engine, on one rank and on several; compares tokens."""
    try:
        settings = DemoSettings(
            output=output,
            engine_name=engine,
            ranks=ranks,
            mode=mode,
            shape=_shape(layers, hidden, experts, top_k, seed),
            num_prompts=prompts,
            num_tokens=tokens,
            fault=fault,
        )
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e

    console = Console()
    end_by_signals()
    try:
        with console.status("") as status:
            result = asyncio.run(run_demo(settings, _ConsoleProgress(console, status)))
    except ServerFailed as e:
        console.print(f"[red]{e}[/]", highlight=False)
        raise typer.Exit(1) from e
    except KeyboardInterrupt:
        console.print("stopped; the servers have ended")
        raise typer.Exit(130) from None
    print_report(result, console)
    plot = output / "inter_token_latency.png"
    plot_latencies(result, plot)
    report = output / "report.html"
    write_report(report, [output / "result.json", *bundled_results()])
    console.print(f"wrote {output / 'result.json'}, {plot} and {report}")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result.as_json(), indent=2) + "\n")
    if not result.is_good:
        raise typer.Exit(1)


def _shape(layers: int, hidden: int, experts: int, top_k: int, seed: int) -> TinyMoE:
    try:
        return TinyMoE(layers, hidden, experts, top_k, seed)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from e


class _ConsoleProgress(Progress):
    def __init__(self, console: Console, status: Status) -> None:
        self._console = console
        self._status = status
        self._stage = ""

    def stage(self, text: str) -> None:
        self._stage = text
        self._console.print(text, highlight=False)
        self._status.update(text)

    def update(self, text: str) -> None:
        self._status.update(f"{self._stage}, {text}")


if __name__ == "__main__":
    app()
