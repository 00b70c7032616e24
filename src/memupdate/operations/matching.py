"""The matcher of a release: made from its facts, held against their wordings, cleared of what is purged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memupdate.errors import ProofFailed
from memupdate.facts.model import Fact
from memupdate.layout import MATCHER_FILE, RegistryLayout
from memupdate.ledger.ledger import Ledger
from memupdate.ledger.records import ReleaseRecord
from memupdate.operations.reports import ProofFailure
from memupdate.operations.session import Session
from memupdate.serving.manifest import MATCHED, read_manifest, with_matcher, write_manifest
from memupdate.serving.matcher import Matcher, load_matcher, matcher_json, read_terms, terms_of, words
from memupdate.storage import file_sha256, write_text_atomic


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


def redact_matchers(layout: RegistryLayout, ledger: Ledger, facts: Sequence[Fact]) -> None:
    """Take the words of purged `facts` out of all matchers, but for those that another fact has too."""
    gone = {words(text) for fact in facts for text in _wordings(fact)}
    for release in ledger.releases():
        folder = layout.release(release.name)
        if not gone or not (folder / MATCHER_FILE).is_file():
            continue
        terms = read_terms(folder / MATCHER_FILE)
        if not gone & set(terms):
            continue
        live = ledger.live_facts(release.collection, as_of_version=release.version)
        others = {words(text) for fact in live if fact not in facts for text in _wordings(fact)}
        write_text_atomic(
            folder / MATCHER_FILE, matcher_json([term for term in terms if term not in gone or term in others])
        )
        manifest = read_manifest(layout.manifest)
        if release.name in manifest.releases:
            write_manifest(layout.manifest, with_matcher(manifest, release.name, file_sha256(folder / MATCHER_FILE)))


def _wordings(fact: Fact) -> tuple[str, ...]:
    return (*((fact.subject,) if fact.subject else ()), fact.prompt, *fact.paraphrases)
