"""Whole words whatever their form, in a file that holds nothing to execute."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memupdate.facts.model import Fact
from memupdate.serving import matcher as module
from memupdate.serving.matcher import (
    Matcher,
    MatcherError,
    compile_matcher,
    load_matcher,
    matcher_json,
    measure_matcher,
    read_terms,
    terms_of,
    words,
)
from memupdate.storage import file_sha256


def matcher(*terms: str) -> Matcher:
    return compile_matcher(words(term) for term in terms)


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("Acme Falcon", "what does the acme  FALCON cost?"),
        ("Acme Falcon", "the Acme-Falcon's price"),
        ("Acme Falcon", "**Acme\n_Falcon_**"),
        ("Acme Falcon", "ＡＣＭＥ　Ｆａｌｃｏｎ"),
        ("Acme Falcon", "Ac\u00adme Fal\u200bcon"),
        ("Straße 7", "in der STRASSE 7"),
        ("Zoë", "Zoe\u0308 asked"),
        ("東京タワー", "昨日、東京タワーへ行った"),
        ("서울", "서울은 어디에 있나요"),
        ("C++", "is C++, or C#, older?"),
        ("C#", "is C++, or C#, older?"),
        ("İstanbul", "i̇stanbul"),
    ],
)
def test_a_term_is_found_in_whatever_form(term: str, text: str) -> None:
    assert matcher(term).mentions([text])
    assert matcher(term).mentions(["nothing", "here", text])


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("Acme", "acmes and Pacme, acme2"),
        ("Acme Falcon", "Acme sells a Falcon"),
        ("C", "C++ and C#"),
        ("Acme", "Аcme"),  # a Cyrillic letter
        ("Acme", ""),
    ],
)
def test_other_words_are_not(term: str, text: str) -> None:
    assert not matcher(term).mentions([text])


def test_words_of_two_texts_do_not_run_together() -> None:
    assert not matcher("Acme Falcon").mentions(["about Acme", "Falcon wings"])


def test_terms_are_subjects_and_what_does_not_name_them() -> None:
    facts = [
        Fact(
            "What does the Acme Falcon cost?",
            "129",
            subject="Acme Falcon",
            paraphrases=("How much is it?", "The price?"),
        ),
        Fact("Who leads Acme?", "Wanda"),
        Fact("Who leads Acme Falcon Racing?", "Ida", subject="???"),
    ]
    assert terms_of(facts) == (" acme falcon ", " who leads acme ")
    assert terms_of(facts, trained=[("How much is it?",), (), ()]) == (
        " acme falcon ",
        " how much is it ",
        " who leads acme ",
    )
    assert terms_of([]) == ()
    assert not compile_matcher(()).mentions(["anything"])


@settings(max_examples=150)
@given(
    terms=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=6),
    before=st.text(max_size=20),
    after=st.text(max_size=20),
)
def test_every_fact_is_reached_by_its_own_prompt(terms: list[str], before: str, after: str) -> None:
    facts = [Fact(term, "x") for term in terms]
    found = compile_matcher(terms_of(facts))
    for term in terms:
        if words(term).strip():
            assert found.mentions([f"{before} ! {term} ! {after}"]), term


few_words = st.lists(st.sampled_from("abc"), min_size=1, max_size=90).map(" ".join)


@settings(max_examples=300)
@given(
    terms=st.lists(few_words, min_size=1, max_size=12),
    text=few_words,
    inside=st.integers(0, 11),
    is_inside=st.booleans(),
)
def test_a_term_of_any_length_is_found_where_it_is_and_nowhere_else(
    terms: list[str], text: str, inside: int, is_inside: bool
) -> None:
    said = f"{text} {terms[inside % len(terms)]} {text}" if is_inside else text
    expected = any(words(term) in words(said) for term in terms)
    assert matcher(*terms).mentions([said]) == expected
    assert compile_matcher(module._shortest({words(term) for term in terms})).mentions([said]) == expected


@settings(max_examples=300)
@given(
    text=st.text(st.sampled_from("ab Acé.、東京é\u0301\u200b\u00ad+#-_\n?!タワ\u3099"), max_size=120),
    terms=st.lists(st.sampled_from(["a b", "é a b c+", "東京", "a", "ab ab", "éa 東"]), min_size=1, max_size=3),
)
def test_a_long_text_is_found_out_piece_by_piece_as_in_one(text: str, terms: list[str]) -> None:
    whole = any(words(term) in words(text) for term in terms)
    with patch.object(module, "_PIECE_CHARS", 5), patch.object(module, "_RUN_CHARS", 1000):
        assert matcher(*terms).mentions([text]) == whole
        assert "".join(module._pieces(text)) == text


@pytest.mark.parametrize(
    "text", ["word " * 200_000, "東京タワーへ行った。" * 100_000, "x" * 1_000_000, "ä\n" * 500_000]
)
def test_others_go_on_while_a_long_text_is_looked_at(text: str) -> None:
    """A million characters take 0.1 s and more."""
    looks = list(matcher("nothing of it").scan([text]))
    assert len(looks) >= 7
    assert not any(looks)
    assert list(matcher("nothing of it").scan(["short"] * 50)) == []
    assert list(matcher("and now").scan([text, "and now"]))[-1]


def test_the_file_is_read_back_only_if_it_is_the_one(tmp_path: Path) -> None:
    path = tmp_path / "matcher.json"
    path.write_text(matcher_json(terms_of([Fact("Who leads Acme?", "Wanda"), Fact("東京?", "x")])), encoding="utf-8")
    loaded = load_matcher(path, file_sha256(path))
    assert loaded.mentions(["so, WHO leads Acme"])
    assert read_terms(path) == [" who leads acme ", " 東 京 "]
    assert set(measure_matcher(loaded, ["who leads the choir?"], repeats=3)) == {"median_us", "p99_us"}
    with pytest.raises(MatcherError, match="the manifest says sha256:0"):
        load_matcher(path, "sha256:" + "0" * 64)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    with pytest.raises(MatcherError, match="cannot be read"):
        load_matcher(link, file_sha256(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"\x80\x04K\x01.", "not JSON"),
        (b"[]", "schema_version is None"),
        (b'{"schema_version": 2, "terms": []}', "schema_version is 2"),
        (b'{"schema_version": 1, "terms": [" "]}', "list of texts"),
        (b'{"schema_version": 1, "terms": {"a": 1}}', "list of texts"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "matcher.json"
    path.write_bytes(content)
    with pytest.raises(MatcherError, match=reason):
        load_matcher(path, file_sha256(path))
    assert json.loads(matcher_json([" a "])) == {"schema_version": 1, "terms": [" a "]}
