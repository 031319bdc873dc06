"""`ep-backend`: the demo, the benchmarks, their report, and the model they use."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

from ep_backend.bench import op, op_cuda, serve
from ep_backend.bench.demo import BACKENDS, DemoSettings, Progress, ServerFailed, run_demo
from ep_backend.bench.demo_report import plot_latencies, print_report
from ep_backend.bench.model import TinyMoE, make_model
from ep_backend.bench.report import NoResult, bundled_results, write_report

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
bench = typer.Typer(no_args_is_help=True, help="Benchmarks; each checks its results first.")
app.add_typer(bench, name="bench")
# `bench op` parses only --device itself: what it measures has options of its own on each.
op_cpu = typer.Typer(pretty_exceptions_enable=False)
op_cpu.command()(op.op)

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
) -> None:
    """Time of dispatch + combine: processes on the CPU, or virtual ranks on a GPU."""
    if device == "cuda":
        raise typer.Exit(op_cuda.main(context.args))
    if device != "cpu":
        raise typer.BadParameter(f"device is {device!r}, expected cpu or cuda")
    typer.main.get_command(op_cpu).main(context.args, prog_name="ep-backend bench op")


@bench.command(
    "serve",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve_command(context: typer.Context) -> None:
    """Latency of a served model, by all-to-all backend."""
    raise typer.Exit(serve.main(context.args))


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
    engine: Annotated[str, typer.Option(help="vllm")] = "vllm",
    mode: Annotated[str, typer.Option(help=", ".join(BACKENDS))] = "low-latency",
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
    if engine != "vllm":
        raise typer.BadParameter(f"engine is {engine!r}, expected 'vllm'")
    try:
        settings = DemoSettings(
            output=output,
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
    # SIGTERM ends the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
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
