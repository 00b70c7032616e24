"""Asking a real engine for many answers at once, freely and greedily, as its clients do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from memupdate.facts.render import Example
from memupdate.serving.client import EngineClient
from memupdate.verification.served import Generated, generate_served

CLIENTS = 16
"""Requests at once: the engine batches them."""


def ask_all(url: str, model: str, examples: Sequence[Example], template_kwargs: Mapping[str, Any]) -> list[Generated]:
    """One request an example, chat or completion as it is rendered, temperature 0, with room to go on. Raises EngineError."""
    with EngineClient(url) as client, ThreadPoolExecutor(CLIENTS) as pool:

        def ask(example: Example) -> Generated:
            return generate_served(client, model, [example], template_kwargs=template_kwargs)[0]

        return list(pool.map(ask, examples))
