"""Part three: what a proof costs. Ten thousand questions proved in one pass and generated, in this process and on vLLM, in one run.

Nothing is stored: what is proved is whatever the untouched base model answers, which it has generated before. Both sides get the
same questions as token ids in batches of the same size, and an answer ends at its own end token. Some are also generated one after the
other, as a client checks facts that has no proof, and some go on after their end token up to the length of a verbatim record.
Invariant: a proof counts where it proves what was generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import torch
from benchmarks.proof.releases import Rows, Say
from benchmarks.proof.worlds import SPEED_SEED, batches, world_facts

from memupdate import Workspace
from memupdate.facts.render import Example
from memupdate.models.base import BaseModel
from memupdate.operations.serving import base_name
from memupdate.operations.session import Session
from memupdate.progress import no_progress
from memupdate.serving.client import EngineClient
from memupdate.verification.inprocess import generate_greedy, prove_recall
from memupdate.verification.served import prove_served

FACTS, QUICK_FACTS = 10_000, 400
ANSWER_TOKENS = 24
"""Longest answer that is waited for; the embedded model's are of two to eight tokens."""
WARM_UP = 128
RECORDS, QUICK_RECORDS, RECORD_TOKENS = 1_000, 64, 100
"""Long answers, and their length."""
RECORD_BATCH = 64
"""As `generate_greedy` has it."""
ALONE = 200
"""Questions that are also generated one after the other."""
REQUEST_PROMPTS, REQUESTS_AT_ONCE = 16, 4
"""As the client's scoring does it: 64 questions are with the engine at any time."""


def figures_of(work: Path, rows: Rows, *, quick: bool, say: Say) -> dict[str, Any]:
    """Both engines, each measured once."""
    root = work / "speed"
    if not (root / "memupdate.toml").is_file():
        Workspace.init(root, model="atlas")
    workspace = Workspace(root)
    return rows.get("speed", lambda: _measure(workspace, QUICK_FACTS if quick else FACTS, say))


def _measure(workspace: Workspace, count: int, say: Say) -> dict[str, Any]:
    session = workspace.session
    questions = session.renderer.render_all(world_facts(count, seed=SPEED_SEED))
    records = questions[: RECORDS if count == FACTS else QUICK_RECORDS]
    row: dict[str, Any] = {"facts": count, "prompt_tokens": sum(len(q.prompt_ids) for q in questions)}
    with workspace.engine() as url:
        for name, asked in (("", questions), ("records_", records)):
            answers, here = in_process(session, asked, is_record=bool(name))
            say(f"{name}in process: {here}")
            examples = [replace(q, target_ids=tuple(a)) for q, a in zip(asked, answers, strict=True)]
            there = on_vllm(session, url, examples, is_record=bool(name))
            say(f"{name}on vLLM: {there}")
            row |= {f"{name}answer_tokens": sum(map(len, answers)), f"{name}in_process": here, f"{name}vllm": there}
    return row


def in_process(
    session: Session, questions: Sequence[Example], *, is_record: bool
) -> tuple[list[list[int]], dict[str, float]]:
    base = session.base

    def generate(chosen: Sequence[Example]) -> list[list[int]]:
        prompts = [q.prompt_ids for q in chosen]
        if is_record:
            return generate_on(base, prompts, RECORD_TOKENS)
        return generate_greedy(base, base.model, prompts, ANSWER_TOKENS, no_progress)

    def prove(chosen: Sequence[Example]) -> int:
        proofs, _ = prove_recall(base, base.model, chosen, min_probability=0.0)
        return sum(p.proved for p in proofs)

    warm = generate(questions[:WARM_UP])
    prove([replace(q, target_ids=tuple(a)) for q, a in zip(questions[:WARM_UP], warm, strict=True)])
    answers, generate_s = timed(lambda: generate(questions))
    proved, prove_s = timed(
        lambda: prove([replace(q, target_ids=tuple(a)) for q, a in zip(questions, answers, strict=True)])
    )
    _, alone_s = timed(lambda: [generate([question]) for question in questions[:ALONE]])
    return answers, _row(len(questions), proved, generate_s, prove_s, alone_s)


def on_vllm(session: Session, url: str, examples: Sequence[Example], *, is_record: bool) -> dict[str, float]:
    name = base_name(session)
    how = {"max_tokens": RECORD_TOKENS, "ignore_eos": True} if is_record else {"max_tokens": ANSWER_TOKENS}
    with EngineClient(url) as client, httpx.Client(base_url=url, timeout=300, trust_env=False) as http:

        def generate(chosen: Sequence[Example]) -> list[str]:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                groups = pool.map(lambda part: _complete(http, name, part, how), batches(chosen, REQUEST_PROMPTS))
                return [text for group in groups for text in group]

        def prove(chosen: Sequence[Example]) -> int:
            return sum(p.proved for p in prove_served(client, name, chosen, min_probability=0.0))

        generate(examples[:WARM_UP])
        prove(examples[:WARM_UP])
        texts, generate_s = timed(lambda: generate(examples))
        proved, prove_s = timed(lambda: prove(examples))
        _, alone_s = timed(lambda: [_complete(http, name, [example], how) for example in examples[:ALONE]])
    own = session.tokenizer.batch_decode([list(e.target_ids) for e in examples], skip_special_tokens=True)
    same = sum(a == b for a, b in zip(texts, own, strict=True))
    return {**_row(len(examples), proved, generate_s, prove_s, alone_s), "generated_as_in_process": same}


def _complete(http: httpx.Client, model: str, part: Sequence[Example], how: dict[str, Any]) -> list[str]:
    body = {"model": model, "prompt": [list(e.prompt_ids) for e in part], "temperature": 0, **how}
    answer = http.post("/v1/completions", json=body)
    answer.raise_for_status()
    return [choice["text"] for choice in sorted(answer.json()["choices"], key=lambda choice: int(choice["index"]))]


@torch.inference_mode()
def generate_on(base: BaseModel, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Greedy continuations of `tokens` tokens, end tokens among them: an id that no token has stops `generate`."""
    never = base.model.config.vocab_size
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, same in groupby(order, key=lambda i: len(prompts[i])):
        for chosen in batches(list(same), RECORD_BATCH):
            ids = torch.tensor([list(prompts[i]) for i in chosen], device=base.device)
            out = base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                eos_token_id=never, pad_token_id=0,
            )  # fmt: skip
            answers |= dict(zip(chosen, out[:, ids.shape[1] :].tolist(), strict=True))
    return [answers[i] for i in range(len(prompts))]


def timed(step: Callable[[], Any]) -> tuple[Any, float]:
    """What `step` returned, and its seconds."""
    started = time.monotonic()
    return step(), time.monotonic() - started


def _row(count: int, proved: int, generate_s: float, prove_s: float, alone_s: float) -> dict[str, float]:
    alone = alone_s / min(ALONE, count)
    return {
        "facts": count,
        "proved": proved,
        "generate_s": round(generate_s, 2),
        "prove_s": round(prove_s, 2),
        "speedup": round(generate_s / prove_s, 2),
        "prove_ms_a_fact": round(1000 * prove_s / count, 3),
        "generate_alone_ms_a_fact": round(1000 * alone, 3),
        "speedup_alone": round(alone / (prove_s / count), 2),
    }


def figures(row: dict[str, Any]) -> dict[str, float | int]:
    """What the results file names; `proof_speedup` is the smaller of the two."""
    here, there = row["in_process"], row["vllm"]
    long_here, long_there = row["records_in_process"], row["records_vllm"]
    return {
        "proof_facts": row["facts"],
        "proof_speedup": min(here["speedup"], there["speedup"]),
        "proof_speedup_in_process": here["speedup"],
        "proof_speedup_vllm": there["speedup"],
        "proof_speedup_one_by_one_in_process": here["speedup_alone"],
        "proof_speedup_one_by_one_vllm": there["speedup_alone"],
        "proof_records": long_here["facts"],
        "proof_speedup_records_in_process": long_here["speedup"],
        "proof_speedup_records_vllm": long_there["speedup"],
        "proof_speedup_records_one_by_one_in_process": long_here["speedup_alone"],
        "proof_speedup_records_one_by_one_vllm": long_there["speedup_alone"],
        "prove_in_process_s": here["prove_s"],
        "generate_in_process_s": here["generate_s"],
        "prove_vllm_s": there["prove_s"],
        "generate_vllm_s": there["generate_s"],
    }
