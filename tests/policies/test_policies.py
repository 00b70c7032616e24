"""Policies: what ships loads, what is wrong is reported all at once, and a stored policy comes back equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memupdate.errors import PolicyError
from memupdate.policies import Policy, load_policy, parse_policy, parse_resolved_policy, shipped_policies
from memupdate.resources import resource_dir

MINIMAL = 'schema_version = 1\nname = "mine"\n'


def problems(text: str, **overrides: Any) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, where="p.toml", overrides=overrides or None)
    return list(caught.value.details)


def test_everything_that_ships_loads_and_says_what_it_is_for() -> None:
    assert {"standard", "atlas", "verbatim"} <= set(shipped_policies())
    for name in shipped_policies():
        policy = load_policy(name)
        assert policy.name == name
        assert policy.description
        opening = (resource_dir("policies") / f"{name}.toml").read_text("utf-8").splitlines()[:6]
        for word in ("Purpose:", "Command:", "Hardware:"):
            assert any(word in line for line in opening), f"{name} does not state its {word}"


def test_standard_writes_out_every_default_and_changes_none() -> None:
    standard = load_policy("standard")
    bare = parse_policy(MINIMAL)
    ignored = {"name", "description"}
    assert standard.model_dump(exclude=ignored) == bare.model_dump(exclude=ignored)
    sections = {name: value for name, value in standard.values().items() if isinstance(value, dict)}
    written = set(standard.origins)
    assert {f"{section}.{key}" for section, keys in sections.items() for key in keys} - written == set()


def test_all_problems_are_reported_together_with_key_value_and_what_is_allowed() -> None:
    lines = problems(
        'schema_version = 1\nname = "Bad Name"\ncolour = 1\n'
        '[facts]\nrendering = "markdown"\n'
        '[memory]\nmax_rank = "64"\n'
        "[training]\nthresold = 0.5\nlearning_rate = 0\nbatch_size = true\n"
        "[guard]\nanchors = 4\nanchors_per_step = 8\n"
        "[budget]\nconfidence = nan\n"
        "[serving]\nextra_args = [1]\n"
    )
    text = "\n".join(lines)
    assert all(line.startswith("p.toml: ") for line in lines)
    assert 'name: got "Bad Name"; allowed: text' in text
    assert "colour: unknown key; allowed: schema_version, name" in text
    assert "facts.rendering: got \"markdown\"; allowed: one of 'auto', 'chat', 'completion'" in text
    assert 'memory.max_rank: got "64"; allowed: a whole number at least 1 and at most 512' in text
    assert "training.thresold: unknown key; did you mean threshold?" in text
    assert "training.learning_rate: got 0; allowed: a number greater than 0 and at most 1" in text
    assert "training.batch_size: got true; allowed: a whole number" in text
    assert "guard: anchors_per_step is 8 and anchors is 4" in text
    assert "budget.confidence: got NaN" in text
    assert "serving.extra_args: got 1; allowed: a list of text" in text
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("[memory]\nmin_rank = 32\nmax_rank = 16", "memory: min_rank is 32 and max_rank is 16"),
        ("[training]\nthreshold = 0.9\nmargin = 0.1", "training: threshold + margin is 1"),
        ("facts = 3", "facts: got 3; allowed: a table with rendering"),
        ("[facts]\nchat_template_kwargs = { a = 1.5 }", "facts.chat_template_kwargs: got 1.5"),
    ],
)
def test_values_that_contradict_each_other(body: str, expected: str) -> None:
    lines = problems(MINIMAL + body)
    assert len(lines) == 1
    assert expected in lines[0]


@pytest.mark.parametrize(
    "word",
    [
        "--trust-remote-code",
        "--trust_remote_code",
        "--trust",
        "--middleware=x.Y",
        "--lora-target",
        "--config",
        "--model",
    ],
)
def test_a_policy_cannot_grant_what_the_server_must_keep(word: str) -> None:
    assert "not for a policy to set" in problems(MINIMAL + f'[serving]\nextra_args = ["{word}"]')[0]


def test_harmless_engine_flags_pass() -> None:
    policy = parse_policy(MINIMAL + '[serving]\nextra_args = ["--enforce-eager", "--block-size", "16"]')
    assert policy.serving.extra_args == ("--enforce-eager", "--block-size", "16")


def test_missing_and_newer_schema_versions() -> None:
    assert problems('name = "x"') == ["p.toml: schema_version: missing; allowed: one of 1"]
    assert 'schema_version: got "true"; allowed: one of 1' in problems('schema_version = true\nname = "x"')[0]
    with pytest.raises(PolicyError, match="schema_version 2 is newer"):
        parse_policy('schema_version = 2\nname = "x"\nunknown = 1')


def test_files_that_are_not_policies(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no such policy") as caught:
        load_policy("standart")
    assert "did you mean standard?" in caught.value.hint
    with pytest.raises(PolicyError, match="is a folder"):
        load_policy(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(PolicyError, match="not UTF-8 at byte 8"):
        load_policy(tmp_path / "latin.toml")
    (tmp_path / "broken.toml").write_text("name = \n", "utf-8")
    with pytest.raises(PolicyError, match=r"broken.toml: not TOML: .*line 1"):
        load_policy(tmp_path / "broken.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(PolicyError, match="larger than"):
        load_policy(tmp_path / "huge.toml")


def test_a_file_from_another_system_reads_the_same(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_policy(tmp_path / "p.toml") == parse_policy(MINIMAL)
    assert load_policy(str(tmp_path / "p.toml")).name == "mine"


def test_overrides_are_checked_and_their_origin_is_kept() -> None:
    policy = parse_policy(MINIMAL + "[training]\nseed = 1", overrides={"proof.publish": "proved", "training.seed": 7})
    assert policy.proof.publish == "proved"
    assert policy.training.seed == 7
    assert policy.origins == {
        "schema_version": "policy",
        "name": "policy",
        "proof.publish": "flag",
        "training.seed": "flag",
    }
    assert (
        "proof.publish: got \"some\"; allowed: one of 'all', 'proved'"
        in problems(MINIMAL, **{"proof.publish": "some"})[0]
    )
    assert "nowhere: unknown key" in problems(MINIMAL, **{"nowhere.x": 1})[0]


@given(
    seed=st.integers(0, 2**32 - 1),
    margin=st.floats(0, 0.49),
    kwargs=st.dictionaries(st.text(max_size=5), st.booleans() | st.integers(-9, 9) | st.text(max_size=5), max_size=3),
    words=st.lists(st.from_regex(r"[a-z0-9]{1,6}", fullmatch=True), max_size=3),
)
def test_a_stored_policy_comes_back_equal(seed: int, margin: float, kwargs: dict[str, Any], words: list[str]) -> None:
    overrides = {
        "training.seed": seed,
        "training.margin": margin,
        "facts.chat_template_kwargs": kwargs,
        "serving.extra_args": words,
    }
    policy = parse_policy(MINIMAL, overrides=overrides)
    again = parse_resolved_policy(policy.resolved_json())
    assert again == policy
    assert again.origins == policy.origins
    assert again.resolved_json() == policy.resolved_json()
    assert {type(v) for v in again.facts.chat_template_kwargs.values()} == {type(v) for v in kwargs.values()}


def test_a_policy_cannot_be_changed_afterwards() -> None:
    policy = load_policy("standard")
    with pytest.raises(Exception, match="frozen"):
        policy.training.seed = 3  # type: ignore[misc]  # the very thing that must fail
    assert isinstance(policy, Policy)
    assert json.loads(policy.resolved_json())["training"]["seed"] == 0


def test_importing_policies_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "vllm")
    code = f"import sys, memupdate.policies; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_keys_are_bound_by_digest_and_every_mistake_is_told() -> None:
    digest = "ab" * 32
    bound = parse_policy(MINIMAL + f'[access]\nkeys = [{{ sha256 = "{digest}", collections = ["acme"] }}]\n')
    (key,) = bound.access.keys
    assert (key.sha256, key.collections, key.base_model) == (digest, ("acme",), True)
    assert parse_resolved_policy(bound.resolved_json()) == bound
    assert parse_policy(MINIMAL).access.keys == ()
    for entry, reason in (
        ('{ sha256 = "my-key", collections = ["acme"] }', "sha256"),
        (f'{{ sha256 = "{digest}", collections = ["*", "acme"] }}', "no collection"),
        (f'{{ sha256 = "{digest}", collections = [] }}', "collections"),
        (f'{{ key = "secret", sha256 = "{digest}", collections = ["*"] }}', "key"),
        (f'{{ sha256 = "{digest}", collections = ["a"] }}, {{ sha256 = "{digest}", collections = ["b"] }}', "twice"),
    ):
        (line,) = problems(f"{MINIMAL}[access]\nkeys = [{entry}]\n")
        assert reason in line
