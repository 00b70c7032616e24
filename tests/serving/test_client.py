"""What the client makes of servers that refuse, break off, hang or are something else. (Scores: `test_real_vllm`.)"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest

from memupdate.errors import EngineError, ExitCode
from memupdate.serving.client import EngineClient, EngineRefused, Request, TokenScore, completion_request


class Server(ThreadingHTTPServer):
    """Answers with `status` and `content`, or scores as vLLM would a model for which only even tokens are likely."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.content: bytes | None = None
        self.delay_s = 0.0
        self.shuffled = False
        """Some requests take four times as long as others."""
        self.now = self.most_at_once = 0
        self.requests: list[dict[str, Any]] = []
        self.lock = Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "tiny"}, {"id": "acme@v1"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append({**body, "authorization": self.headers.get("authorization")})
            self.server.now += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.now)
        try:
            self.answer_post(body)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def answer_post(self, body: dict[str, Any]) -> None:
        if self.server.content is not None:
            self.answer(None)
            return
        choices = [
            {"index": index, "prompt_logprobs": [None, *map(position, prompt[1:])]}
            for index, prompt in enumerate(body["prompt"])
        ]
        self.answer({"choices": choices[::-1]})

    def answer(self, value: object) -> None:
        time.sleep(self.server.delay_s * (1 + 3 * (len(self.server.requests) % 2 and self.server.shuffled)))
        content = json.dumps(value).encode() if self.server.content is None else self.server.content
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def position(token: int) -> dict[str, object]:
    if token % 2 == 0:
        return {str(token): {"logprob": -0.1, "rank": 1, "decoded_token": f"<{token}>"}}
    return {
        str(token): {"logprob": -3.0, "rank": 5, "decoded_token": f"<{token}>"},
        "2": {"logprob": -0.2, "rank": 1, "decoded_token": "<2>"},
    }


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_scores_come_back_in_order_from_several_requests(server: Server) -> None:
    prompts = [[1, number] for number in range(40)]
    targets = [[number, number + 1, 7][: number % 4] for number in range(40)]
    with EngineClient(server.url, api_key="key") as client:
        scores = client.score_targets("acme@v1", prompts, targets)
        assert client.score_targets("acme@v1", [], []) == []
    assert [[score.token_id for score in row] for row in scores] == targets
    assert scores[2][0] == TokenScore(2, -0.1, 1, 2, "<2>", "<2>")
    assert scores[3][2] == TokenScore(7, -3.0, 5, 2, "<2>", "<7>")
    assert sorted(len(request["prompt"]) for request in server.requests) == [8, 16, 16]
    assert {request["authorization"] for request in server.requests} == {"Bearer key"}
    assert all(request["max_tokens"] == 1 and request["prompt_logprobs"] == 1 for request in server.requests)


def test_long_prompts_are_spread_over_requests(server: Server) -> None:
    with EngineClient(server.url) as client:
        client.score_targets("acme@v1", [[1] * 5000, [1] * 5000, [1] * 20000, [1, 2]], [[2]] * 4)
    assert sorted(len(request["prompt"]) for request in server.requests) == [1, 1, 1, 1]


def test_a_missing_score_is_an_error_and_not_a_guess(server: Server) -> None:
    with EngineClient(server.url) as client:
        for logprobs in (
            [None, None, position(4)],
            [None, {"9": {"logprob": 0, "rank": 1}}, position(4)],
            [None],
            None,
        ):
            server.content = json.dumps({"choices": [{"index": 0, "prompt_logprobs": logprobs}]}).encode()
            with pytest.raises(EngineError):
                client.score_targets("acme@v1", [[1]], [[2, 4]])
        server.content = b'{"choices": []}'
        with pytest.raises(EngineError, match="did not answer as vLLM does"):
            client.score_targets("acme@v1", [[1]], [[2]])
        with pytest.raises(ValueError, match="empty"):
            client.score_targets("acme@v1", [[]], [[2]])
        with pytest.raises(ValueError, match="1 prompts and 2 targets"):
            client.score_targets("acme@v1", [[1]], [[2], [3]])


def read_scored_token(answer: Any, _: object) -> int:
    return int(next(iter(answer["choices"][0]["prompt_logprobs"][1])))


def test_refusals_carry_status_and_reason(server: Server) -> None:
    server.status = 404
    server.content = b'{"error": {"message": "The model `x` does not exist.", "code": 404}}'
    with EngineClient(server.url) as client:
        with pytest.raises(EngineRefused, match="answered 404: The model `x` does not exist") as caught:
            client.complete("x", "prompt", 1)
        assert caught.value.status == 404
        assert caught.value.exit_code == ExitCode.UNREACHABLE
        server.status, server.content = 500, b"<html>\n broken </html>"
        with pytest.raises(EngineRefused, match="answered 500: <html> broken </html>"):
            client.score_targets("x", [[1]], [[2]])
        with pytest.raises(EngineRefused, match="answered 500"):
            client.ask_together([completion_request("x", "prompt", 1)] * 9, at_once=2)
        assert not client.health()


@pytest.mark.parametrize("content", [b"hello", b"[]", b"{}", b'{"choices": [{}]}', b'{"choices": null}'])
def test_another_kind_of_server_is_recognised(server: Server, content: bytes) -> None:
    server.content = content
    with EngineClient(server.url) as client:
        for call in (
            client.models,
            lambda: client.complete("x", [1], 1),
            lambda: client.chat("x", [{"role": "user", "content": "x"}], 1),
            lambda: client.ask_together([completion_request("x", [1], 1)] * 3, at_once=2),
        ):
            server.requests.clear()
            with pytest.raises(EngineError, match="did not answer as vLLM does"):
                call()


def test_nobody_there_and_no_answer_are_one_clear_line(server: Server) -> None:
    with EngineClient("http://127.0.0.1:9") as client:
        assert not client.health()
        for call in (client.models, lambda: client.score_targets("x", [[1]], [[2]])):
            with pytest.raises(EngineError, match="cannot be reached") as caught:
                call()
            assert "\n" not in caught.value.message
            assert caught.value.hint
    server.delay_s = 1.0
    with EngineClient(server.url, timeout_s=0.1) as client:
        for call in (client.models, lambda: client.score_targets("x", [[1]], [[2]])):
            with pytest.raises(EngineError, match="did not answer in time"):
                call()


def test_requests_made_together_are_as_many_as_may_be_and_answered_in_order(server: Server) -> None:
    server.delay_s = 0.02
    asked = [[2 * number, 2] for number in range(40)]
    with EngineClient(server.url, "key") as client:
        requests = [Request("/v1/completions", {"prompt": [prompt]}, read_scored_token) for prompt in asked]
        assert client.ask_together(requests, at_once=5) == [2] * 40
        assert server.most_at_once == 5
        server.shuffled = True
        scores = client.score_targets("x", asked, [[2 * number + 4] for number in range(40)])
    assert [s[0].token_id for s in scores] == [2 * number + 4 for number in range(40)]
    assert {request["authorization"] for request in server.requests} == {"Bearer key"}


def test_requests_can_be_made_together_inside_an_event_loop(server: Server) -> None:
    async def notebook() -> list[list[TokenScore]]:
        with EngineClient(server.url) as client:
            return client.score_targets("x", [[1]], [[2]])

    assert asyncio.run(notebook())[0][0].token_id == 2


def test_models_lists_names(server: Server) -> None:
    with EngineClient(server.url + "/") as client:
        assert client.models() == ("tiny", "acme@v1")
        assert client.health()
