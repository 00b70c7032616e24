"""An endpoint that runs a model of this process behind real HTTP, and answers where proofs ask as vLLM does."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

import torch

from memupdate.models.base import BaseModel


class Endpoint(ThreadingHTTPServer):
    """`/v1/completions` and `/v1/chat/completions` of one model, as vLLM answers them."""

    daemon_threads = True
    request_queue_size = 64  # as many as a client may send at once

    def __init__(self, base: BaseModel) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base, self.lock = base, Lock()
        self.tie = False
        """Whether the engine ranks another token beside every target token."""
        self.suffix = ""
        """What it says after every free answer."""
        self.requests: list[dict[str, Any]] = []

    @torch.inference_mode()
    def scores(self, ids: list[int]) -> list[dict[str, Any] | None]:
        logits = self.base.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        positions: list[dict[str, Any] | None] = [None]
        for token, row in zip(ids[1:], logits.log_softmax(-1), strict=True):
            rank = int((row > row[token]).sum()) + 1 + self.tie
            best = int(row.argmax())
            position = {str(best): {"logprob": float(row[best]), "rank": 1, "decoded_token": self.decode([best])}}
            own = {"logprob": float(row[token]), "rank": rank, "decoded_token": self.decode([token])}
            positions.append({**position, str(token): own})
        return positions

    def decode(self, ids: list[int]) -> str:
        return str(self.base.tokenizer.decode(ids, skip_special_tokens=len(ids) > 1))

    @torch.inference_mode()
    def continuation(self, ids: list[int], max_tokens: int) -> tuple[str, str]:
        prompt = torch.tensor([ids])
        output = self.base.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max_tokens
        )
        new = output[0, len(ids) :].tolist()
        ended = new[-1] == self.base.tokenizer.eos_token_id
        return self.base.tokenizer.decode(new, skip_special_tokens=True) + self.suffix, "stop" if ended else "length"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.answer({"model": body["model"], "choices": self.choices(body)})

    def choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        tokenizer = self.server.base.tokenizer
        if "prompt_logprobs" in body:
            return [{"index": i, "prompt_logprobs": self.server.scores(p)} for i, p in enumerate(body["prompt"])]
        if "messages" in body:
            ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
            text, reason = self.server.continuation(ids, body["max_tokens"])
            return [{"index": 0, "message": {"content": text}, "finish_reason": reason}]
        text, reason = self.server.continuation(tokenizer.encode(body["prompt"]), body["max_tokens"])
        return [{"index": 0, "text": text, "finish_reason": reason}]

    def answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
