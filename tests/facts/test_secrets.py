"""Secrets are no facts: what is found, what is not, and that no message repeats one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memupdate.errors import FactsError, PolicyError
from memupdate.facts import Fact, Probe, read_facts
from memupdate.facts.model import Message
from memupdate.facts.secrets import BUILT_IN, DEFAULT_NAMES, SecretPatterns, parse_pattern
from memupdate.policies.loader import parse_policy

# Put together here, so that no scanner of repositories takes this file for a leak.
SECRETS = {
    "private-key": ["-----BEGIN " + "OPENSSH PRIVATE KEY-----", "-----BEGIN " + "PRIVATE KEY-----", "PuTTY-User-Key-" + "File-3"],
    "aws-key": ["AKIA" + "IOSFODNN7EXAMPLE", "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"],
    "api-token": [
        "ghp_" + "a1" * 18,
        "github_pat_" + "A1b2" * 8,
        "glpat-" + "x" * 20,
        "xoxb-" + "123456789012-abc",
        "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
        "sk-" + "proj_" + "a" * 40,
        "AIza" + "Sy" + "D" * 33,
        "hf_" + "A" * 34,
        "eyJ" + "hbGciOiJIUzI1NiJ9." + "eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N",
    ],
    "card-number": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
    "env-line": ["DB_PASSWORD=hunter2hunter2", "before\nexport API_KEY = 'abcdefgh'"],
}  # fmt: skip
HARMLESS = [
    "The private key of the vault is held by Wanda Kettleman.",
    "AKIA is a record label; Asia is a continent.",
    "sk-learn is short for scikit-learn, and gh is GitHub's command.",
    "9100672710",
    "4111 1111 1111 1112",
    "0000 0000 0000 0000",
    "Its ISBN is 978-3-16-148410-0, in 3.14159265358979323846 ways.",
    "a = b, and the password is asked for at login",
]


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in SECRETS.items() for text in texts])
def test_each_kind_is_found(name: str, text: str) -> None:
    assert SecretPatterns.named([name]).match(f"It is {text}" if name != "env-line" else text) == name
    assert SecretPatterns.named(list(BUILT_IN)).match(text) is not None


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_one_is_let_through(text: str) -> None:
    assert SecretPatterns.named(list(BUILT_IN)).match(text) is None


def test_every_text_of_a_fact_is_looked_at() -> None:
    secret = SECRETS["aws-key"][0]
    fact = Fact(
        prompt=f"p {secret}",
        target=secret,
        subject=secret,
        relation=secret,
        paraphrases=("fine", secret),
        locality=(Probe(secret, secret),),
        source=secret,
        tags=(secret,),
        external_id=secret,
        portability=(Probe("fine", secret),),
        context=(Message("user", secret),),
    )
    found = SecretPatterns().problems(fact)
    assert [name for name, _ in found] == [
        "prompt",
        "target",
        "subject",
        "relation",
        "source",
        "id",
        "paraphrases[1]",
        "tags[0]",
        "context[0].content",
        "locality[0].prompt",
        "locality[0].target",
        "portability[0].target",
    ]
    assert SecretPatterns(()).problems(fact) == []


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "The key?", "target": "SECRET"},
        {"prompt": "The key?", "target": 3, "valid_from": "SECRET"},
        {"prompt": "The key?", "target": "t", "SECRET": 1},
        {"prompt": "The key?", "target": "t", "rendering": "SECRET"},
        {"prompt": "The key?", "targt": "SECRET", "rendering": "SECRET"},
        ["SECRET"],
    ],
)
@pytest.mark.parametrize("secret", [SECRETS["aws-key"][0], SECRETS["api-token"][0], SECRETS["private-key"][0]])
def test_no_message_repeats_a_secret(record: Any, secret: str, tmp_path: Path) -> None:
    text = json.dumps(record).replace("SECRET", secret)
    for content in (text, text[:-1], f"[{text}]", f"{text}\n{text}".replace("The key?", "k", 1)):
        path = tmp_path / "facts.json"
        path.write_text(content, "utf-8")
        with pytest.raises(FactsError) as caught:
            read_facts(path)
        assert caught.value.details
        assert secret[:12] not in "\n".join([caught.value.message, caught.value.hint, *caught.value.details])


def test_the_line_and_the_field_are_named(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    good = '{"prompt": "Who leads Acme?", "target": "Wanda"}\n'
    path.write_text(good + json.dumps({"prompt": "The key?", "target": SECRETS["aws-key"][0]}), "utf-8")
    with pytest.raises(FactsError) as caught:
        read_facts(path)
    assert caught.value.details == (f"{path}:2: target: looks like a secret (aws-key), which the policy refuses",)
    assert len(read_facts(path, skip_invalid=True).facts) == 1
    assert len(read_facts(path, secrets=SecretPatterns(())).facts) == 2


POLICY = 'schema_version = 1\nname = "p"\n'


def test_a_policy_names_patterns_and_its_own() -> None:
    assert parse_policy(POLICY).facts.refuse == DEFAULT_NAMES == ("private-key", "aws-key", "api-token")
    own = parse_policy(POLICY + "[facts]\nrefuse = ['card-number', 're:\\bPROJECT-[0-9]+']")
    patterns = SecretPatterns.named(own.facts.refuse)
    assert patterns.match("It is PROJECT-17.") == r"re:\bPROJECT-[0-9]+"
    assert patterns.match("ghp_" + "a1" * 18) is None
    assert parse_policy(POLICY + "[facts]\nrefuse = []").facts.refuse == ()


@pytest.mark.parametrize("own", [r"re:^PROJECT-[0-9]+$", r"re:\APROJECT-17\Z"])
def test_an_own_pattern_sees_each_text_by_itself(own: str) -> None:
    fact = Fact("Which project?", "PROJECT-17", subject="Acme", source="PROJECT-170 b")
    found = SecretPatterns.named([own]).problems(fact)
    assert found == [("target", f"looks like a secret ({own}), which the policy refuses")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("card", "allowed: private-key, aws-key, api-token, card-number, env-line, or re: and a regular expression"),
        ("re:(", "is no regular expression"),
        ("re:a*", "matches every text"),
    ],
)
def test_a_pattern_that_is_none(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="allowed"):
        parse_pattern(text)
    with pytest.raises(PolicyError) as caught:
        parse_policy(POLICY + f"[facts]\nrefuse = ['{text}']")
    assert "policy: facts.refuse: " in caught.value.details[0]
    assert reason in caught.value.details[0]
