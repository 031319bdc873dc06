"""`ep-backend top`: its numbers are those of the scrape."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ep_backend.cli import app
from ep_backend.observe import scrape, top

pytest.importorskip("prometheus_client")

SCRAPE = """
# TYPE ep_backend_operations_total counter
ep_backend_operations_total{rank="0",op="dispatch_send"} 100
ep_backend_operations_total{rank="0",op="combine_recv"} 100
ep_backend_operations_total{rank="1",op="dispatch_send"} 100
# TYPE ep_backend_tokens_total counter
ep_backend_tokens_total{rank="0"} 700
ep_backend_tokens_total{rank="1"} 300
# TYPE ep_backend_op_seconds histogram
ep_backend_op_seconds_sum{rank="0",op="dispatch_send"} 0.010
ep_backend_op_seconds_sum{rank="0",op="dispatch_recv"} 0.015
# TYPE ep_backend_forward_seconds_total counter
ep_backend_forward_seconds_total{rank="0"} 0.1
# TYPE ep_backend_wait_seconds_total counter
ep_backend_wait_seconds_total{rank="0",op="dispatch_recv",peer="1"} 0.25
ep_backend_wait_seconds_total{rank="0",op="combine_recv",peer="1"} 0.5
ep_backend_wait_seconds_total{rank="1",op="dispatch_recv",peer="0"} 0.002
# TYPE ep_backend_sent_bytes_total counter
ep_backend_sent_bytes_total{rank="0",op="dispatch_send",peer="1",link="shm"} 3000000
ep_backend_sent_bytes_total{rank="0",op="dispatch_send",peer="0",link="self"} 9000000
# TYPE ep_backend_expert_rows_total counter
ep_backend_expert_rows_total{rank="0",expert="0"} 60
ep_backend_expert_rows_total{rank="0",expert="1"} 20
ep_backend_expert_rows_total{rank="1",expert="2"} 20
ep_backend_expert_rows_total{rank="1",expert="3"} 20
# TYPE ep_backend_timeouts_total counter
ep_backend_timeouts_total{rank="1",op="dispatch_recv",peer="0"} 1
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3
"""


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Answers with `SCRAPE`, but for /empty."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"" if self.path == "/empty" else SCRAPE.encode())

        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def rows_of(text: str) -> list[list[str]]:
    """Cells of all table rows."""
    return [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
        for line in text.splitlines()
        if "│" in line
    ]


def test_once_prints_everything_and_ends(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = CliRunner().invoke(app, ["top", "--once", endpoint])
    assert result.exit_code == 0, result.output
    rows = rows_of(result.output)
    assert ["0", "100", "700", "3.0", "250", "25%", "0.750", "80", "0"] in rows
    assert ["1", "100", "300", "-", "-", "-", "0.002", "40", "1"] in rows
    assert ["0", "0.0", "750.0"] in rows, "rank 0 waited for rank 1"
    assert ["1", "2.0", "0.0"] in rows
    assert "largest over mean 2.00, of ranks 1.33" in result.output
    assert ["0", "0", "60", "2.00"] in rows, "the hottest expert comes first"


def test_between_two_looks_are_rates(endpoint: str) -> None:
    seen = scrape.look(scrape.endpoint_urls([endpoint]))
    later = scrape.read([SCRAPE.replace("} 0.5\n", "} 1.5\n").replace("} 700", "} 900")])
    difference = later.since(seen, seconds=4.0)
    assert difference.wait_seconds[0, 1] == pytest.approx(1.0)
    console = Console(record=True, width=160)
    console.print(top.tables(difference))
    rows = rows_of(console.export_text())
    assert ["0", "0.0", "250.0"] in rows, "ms a second"
    assert rows[0][:3] == ["0", "0/s", "50/s"]
    assert ["0", "0", "0", "-"] in rows, "no rows in this time: no mean"


def test_a_rank_that_has_started_again_counts_from_zero() -> None:
    before, now = (scrape.read([SCRAPE.replace("} 700", f"}} {n}")]) for n in (700, 30))
    assert now.since(before, 1.0).tokens[0] == 30


def test_what_is_wrong_with_an_endpoint_is_said(endpoint: str) -> None:
    for arguments, text in (
        (["127.0.0.1:1"], "EP_BACKEND_METRICS_PORT"),
        ([f"http://{endpoint}/empty"], "no ep_backend metrics there"),
        (["http://localhost", "--ranks", "2"], "names no port"),
    ):
        result = CliRunner().invoke(app, ["top", "--once", *arguments])
        assert result.exit_code == 1
        assert text in result.output


def test_endpoints() -> None:
    assert scrape.endpoint_urls(["a:1", "https://b/x"]) == ["http://a:1/metrics", "https://b/x"]
    assert scrape.endpoint_urls(["a:9400"], 2) == ["http://a:9400/metrics", "http://a:9401/metrics"]


@pytest.mark.parametrize(
    ("rows", "expected"), [([1, 1, 1, 1], 1.0), ([4, 0, 0, 0], 4.0), ([0, 0], None), ([], None)]
)
def test_imbalance_is_the_largest_over_the_mean(rows: list[float], expected: float | None) -> None:
    assert top.imbalance(rows) == expected
