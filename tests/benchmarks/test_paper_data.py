"""The data of the paper's benchmarks: generated sets, and files in the paper's own form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.paper.data import (
    QUESTION,
    Passage,
    ordinary_tokens,
    passage_example,
    phonebook,
    prefix_of,
    prose,
    read_passages,
    read_phonebook,
)

from memupdate.errors import UsageError
from memupdate.facts.render import Renderer

# Two entries as the paper's files have them; the names and numbers are made up here.
ENTRIES = [
    {"id": 1, "query": "Jane Doe:", "target": "2025550123", "target_len": 4},
    {"id": 2, "query": "John Roe:", "target": "2025550199", "target_len": 4},
]


def test_a_phonebook_is_the_same_each_time_and_grows_at_its_end() -> None:
    small, large = phonebook(50, seed=3), phonebook(9000, seed=3)
    assert large[:50] == small
    assert len({fact.prompt for fact in large}) == 9000
    assert all(len(fact.target) == 10 and fact.target.isdecimal() and fact.prompt.endswith(":") for fact in large)
    assert phonebook(50, seed=4) != small


def test_entries_of_the_papers_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "PB8.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ENTRIES))
    assert [(fact.prompt, fact.target) for fact in read_phonebook(file)] == [
        ("Jane Doe:", "2025550123"),
        ("John Roe:", "2025550199"),
    ]


def test_a_prefix_has_the_tokens_asked_for_and_no_entry_too_many(atlas_renderer: Renderer) -> None:
    examples = atlas_renderer.render_all(phonebook(20, seed=0))
    sizes = [len(example.target_ids) for example in examples]
    for wanted in (1, sizes[0], sizes[0] + 1, 60):
        chosen = sizes[: len(prefix_of(examples, wanted))]
        assert sum(chosen) >= wanted > sum(chosen[:-1])
    with pytest.raises(UsageError, match="target tokens"):
        prefix_of(examples, sum(sizes) + 1)


def test_a_passage_without_noise_is_its_text(atlas_renderer: Renderer) -> None:
    text = prose(0)
    example = passage_example(atlas_renderer, Passage(QUESTION, text), 80, noise=0.0, seed=0, ordinary=[])
    assert len(example.target_ids) == 80
    assert text.startswith(atlas_renderer.tokenizer.decode(list(example.target_ids[:-1])))  # type: ignore[attr-defined]
    assert example.target_ids[-1] == atlas_renderer.chat_end
    assert example.prompt_ids == atlas_renderer.prompt_ids(QUESTION, "chat")


def test_noise_stands_for_its_share_of_the_tokens(atlas_renderer: Renderer) -> None:
    ordinary, passage = ordinary_tokens(atlas_renderer, 1536), Passage(QUESTION, prose(0))
    plain, half, full = (
        passage_example(atlas_renderer, passage, 401, noise=noise, seed=1, ordinary=ordinary).target_ids[:-1]
        for noise in (0.0, 0.5, 1.0)
    )
    kept = [sum(a == b for a, b in zip(plain, noisy, strict=True)) for noisy in (half, full)]
    assert 160 < kept[0] < 240
    assert kept[1] < 8
    assert set(full) <= set(ordinary)
    assert not set(ordinary) & set(atlas_renderer.tokenizer.all_special_ids)  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused(atlas_renderer: Renderer) -> None:
    with pytest.raises(UsageError, match="512"):
        passage_example(atlas_renderer, Passage(QUESTION, prose(0)), 500, noise=0.0, seed=0, ordinary=[])
    with pytest.raises(UsageError, match="asked for"):
        passage_example(atlas_renderer, Passage(QUESTION, "too short"), 80, noise=0.0, seed=0, ordinary=[])


def test_passages_of_the_papers_files_are_read_and_others_refused(tmp_path: Path) -> None:
    file = tmp_path / "random.jsonl"
    file.write_text(json.dumps({"question": "Say it.", "matching": " a b c"}) + "\n")
    assert read_passages(file) == [Passage("Say it.", " a b c")]
    file.write_text(file.read_text() + json.dumps({"question": "Say it."}) + "\n")
    with pytest.raises(UsageError, match=r"random.jsonl:2.*matching"):
        read_passages(file)
