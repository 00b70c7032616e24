"""The matcher of a release: made from its facts, held against their wordings, cleared of what is purged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from memupdate.errors import ProofFailed
from memupdate.facts.model import Fact
from memupdate.layout import MATCHER_FILE, RegistryLayout
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.lock import manifest_lock
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations.reports import ProofFailure
from memupdate.operations.session import Session
from memupdate.serving.manifest import MATCHED, read_manifest, with_matcher, write_manifest
from memupdate.serving.matcher import Matcher, load_matcher, matcher_json, read_terms, terms_of, words
from memupdate.storage import file_sha256, remove_leftovers, text_sha256, write_text_atomic


def write_matcher(folder: Path, session: Session, facts: Sequence[Fact]) -> None:
    """Write `matcher.json` of a release that holds `facts`; paraphrases that only measure are left out."""
    trained = [session.phrasings(fact)[0] for fact in facts]
    write_text_atomic(folder / MATCHER_FILE, matcher_json(terms_of(facts, trained=trained)))


def matcher_digest(folder: Path) -> str | None:
    """`sha256:…` of a release folder's matcher; None where it has none (releases of before routing)."""
    file = folder / MATCHER_FILE
    return file_sha256(file) if file.is_file() else None


def matcher_of(folder: Path) -> Matcher | None:
    """The matcher of a release folder; None where it has none. Raises MatcherError for a damaged one."""
    digest = matcher_digest(folder)
    return None if digest is None else load_matcher(folder / MATCHER_FILE, digest)


def unreached(matcher: Matcher, facts: Sequence[Fact]) -> tuple[ProofFailure, ...]:
    """Facts of which some wording would go to the base model where the route is `matched`, each with the first such one."""
    failures = []
    for fact in facts:
        turns = [turn.content for turn in fact.context]
        for wording in (fact.prompt, *fact.paraphrases):
            if not matcher.mentions([*turns, wording]):
                told = f"{wording!r}: mentions nothing that the router knows, so the base model would answer"
                failures.append(ProofFailure(fact.id, fact.prompt, told))
                break
    return tuple(failures)


def refuse_unreached(layout: RegistryLayout, ledger: Ledger, release: ReleaseRecord, route: str) -> None:
    """Facts that the router would miss are failures of the release where `route` is `matched`. Needs no engine.

    Raises:
        ProofFailed: some wording of a live fact would go to the base model; `details` has one line per fact.
    """
    matcher = matcher_of(layout.release(release.name)) if route == MATCHED else None
    if matcher is None:  # without one the router sends everything to the release
        return
    missed = unreached(matcher, ledger.live_facts(release.collection, as_of_version=release.version))
    if missed:
        raise ProofFailed(
            f"{release.name} is not published: the router would miss {len(missed)} fact(s)",
            'give them a `subject` that their wordings name, or set serving.route = "always" in the policy',
            [failure.explanation for failure in missed],
        )


def clean_matchers(layout: RegistryLayout, ledger: Ledger, facts: Sequence[Fact]) -> Iterator[tuple[str, str]]:
    """Releases whose matchers have words of `facts`, each with the text of one without, but for words that another fact has too."""
    gone = {words(text) for fact in facts for text in _wordings(fact)}
    for release in ledger.releases() if gone else ():
        file = layout.release(release.name) / MATCHER_FILE
        terms = read_terms(file) if file.is_file() else []
        if not gone & set(terms):
            continue
        live = ledger.live_facts(release.collection, as_of_version=release.version)
        others = {words(text) for fact in live if fact not in facts for text in _wordings(fact)}
        kept = [term for term in terms if term not in gone or term in others]
        if kept != terms:
            yield release.name, matcher_json(kept)


def redact_matchers(layout: RegistryLayout, ledger: Ledger, facts: Sequence[Fact]) -> None:
    """Take the words of `facts`, which the ledger still has, out of all matchers.

    The file goes first: engines keep the matcher that they have until the manifest names another. Killed in between,
    `settle_matchers` mends it.
    """
    for name, text in clean_matchers(layout, ledger, facts):
        write_text_atomic(layout.release(name) / MATCHER_FILE, text)
        settle_matchers(layout, {name: text_sha256(text)})


def settle_matchers(layout: RegistryLayout, wanted: Mapping[str, str]) -> None:
    """The manifest names the matchers that are there, of releases whose file has the digest that it was meant to get."""
    if not wanted or not layout.manifest.exists():
        return
    with manifest_lock(layout, "naming matchers"):
        remove_leftovers(layout.root)
        manifest = before = read_manifest(layout.manifest)
        for name, digest in wanted.items():
            if name in manifest.releases and matcher_digest(layout.release(name)) == digest:
                manifest = with_matcher(manifest, name, digest)
        if manifest is not before:
            write_manifest(layout.manifest, manifest)


def _wordings(fact: Fact) -> tuple[str, ...]:
    return (*((fact.subject,) if fact.subject else ()), fact.prompt, *fact.paraphrases)
