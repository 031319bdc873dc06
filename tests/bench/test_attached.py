"""Servers that run already: waited for, asked for their model's name, and left running."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ep_backend.bench.client import served_name
from ep_backend.bench.server import ServerFailed, attached_server


@contextmanager
def serving(pages: dict[str, list[tuple[int, str]]]) -> Iterator[str]:
    """Answers each page with its answers in turn, the last one for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers = pages.get(self.path, [(404, "")])
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


async def test_it_is_used_once_it_is_healthy() -> None:
    models = json.dumps({"data": [{"id": "named"}]})
    with serving({"/health": [(503, ""), (200, "")], "/v1/models": [(200, models)]}) as url:
        async with attached_server(f"{url}/", 10.0) as server:
            assert (server.base_url, server.log) == (url, None)
            assert server.start_secs > 0
            assert await served_name(server.base_url) == "named"


async def test_one_that_does_not_get_healthy_is_told_by_its_url() -> None:
    unhealthy = r"^http://127\.0\.0\.1:\d+ was not healthy after 1 s\.$"
    with serving({"/health": [(503, "")]}) as url, pytest.raises(ServerFailed, match=unhealthy):
        async with attached_server(url, 1.0):
            pass


@pytest.mark.parametrize("answer", [(404, ""), (200, "no JSON"), (200, '{"data": []}')])
async def test_one_without_a_models_name_is_an_error(answer: tuple[int, str]) -> None:
    nameless = "/v1/models does not name a model"
    with serving({"/v1/models": [answer]}) as url, pytest.raises(RuntimeError, match=nameless):
        await served_name(url)
