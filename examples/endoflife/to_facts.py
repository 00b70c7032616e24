"""Makes facts of endoflife.date's product pages: versions, release dates and ends of support, which change from month to month.

    git clone --depth 1 https://github.com/endoflife-date/endoflife.date
    python examples/endoflife/to_facts.py endoflife.date/products > facts.jsonl
    memupdate add facts.jsonl

Each page is Markdown with YAML in front. For each release cycle that has the field, one fact:

| field of the page | question | relation, beside the subject `<title> <cycle>` |
| --- | --- | --- |
| `latest`, `latestReleaseDate` | What is the latest version of Python 3.12? | latest version, valid from `latestReleaseDate` |
| `eol`, where it is a date | When does support for Python 3.12 end? | end of support |
| `releaseDate` | When was Python 3.12 released? | release date, valid from `releaseDate` |

and for each product, of its first cycle (pages list the newest first): What is the newest release cycle of Python? Two snapshots of the
pages are then two files of which the second supersedes what has changed since the first. The pages are MIT-licensed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FIELDS = ("newest", "latest", "eol", "release")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def product_facts(page: str, fields: tuple[str, ...] = FIELDS) -> Iterator[dict[str, Any]]:
    """The facts of one page as records of the native format; none for a page without releases."""
    # Everything as text: a version 3.10 is no number.
    front = yaml.load(page.split("\n---", 1)[0].removeprefix("---"), Loader=yaml.BaseLoader) or {}
    title, releases = front.get("title", ""), front.get("releases") or []
    if title and releases and "newest" in fields:
        yield _fact(
            title,
            "newest release cycle",
            releases[0].get("releaseCycle", ""),
            "What is the newest release cycle of {}?",
            ("Which release cycle of {} is the newest?", "Name the newest release cycle of {}."),
            releases[0].get("releaseDate"),
        )
    for release in releases:
        yield from _cycle_facts(f"{title} {release.get('releaseCycle', '')}", release, fields)


def _cycle_facts(subject: str, release: dict[str, str], fields: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    if "latest" in fields:
        yield _fact(
            subject,
            "latest version",
            release.get("latest", ""),
            "What is the latest version of {}?",
            ("Which version of {} is the latest?", "Name the latest version of {}."),
            release.get("latestReleaseDate"),
        )
    if "eol" in fields and _DATE.fullmatch(release.get("eol", "")):
        yield _fact(
            subject,
            "end of support",
            release["eol"],
            "When does support for {} end?",
            ("On which date does {} reach its end of life?", "Until when is {} supported?"),
            None,
        )
    if "release" in fields:
        yield _fact(
            subject,
            "release date",
            release.get("releaseDate", ""),
            "When was {} released?",
            ("What is the release date of {}?", "On which date did {} come out?"),
            release.get("releaseDate"),
        )


def _fact(
    subject: str, relation: str, target: str, prompt: str, others: tuple[str, ...], since: str | None
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "prompt": prompt.format(subject),
        "target": target.strip(),
        "subject": subject,
        "relation": relation,
        "paraphrases": [other.format(subject) for other in others],
        "source": "endoflife.date",
    }
    if since and _DATE.fullmatch(since):
        record["valid_from"] = since
    return record


def folder_facts(folder: Path, fields: tuple[str, ...] = FIELDS) -> Iterator[dict[str, Any]]:
    """The facts of all pages of a folder; where two ask the same, the first stays, since a page may list a cycle twice."""
    seen: set[tuple[str, str]] = set()
    for path in sorted(folder.glob("*.md")):
        for record in product_facts(path.read_text(encoding="utf-8"), fields):
            key = (record["subject"].casefold(), record["relation"])
            if record["target"] and key not in seen:
                seen.add(key)
                yield record


def main() -> None:
    parser = argparse.ArgumentParser(description="Facts of endoflife.date's product pages, as JSON Lines on stdout.")
    parser.add_argument("folder", type=Path, help="the folder of product pages (*.md)")
    parser.add_argument("--fields", default=",".join(FIELDS), help=f"some of {', '.join(FIELDS)} (default: all)")
    options = parser.parse_args()
    fields = tuple(options.fields.split(","))
    if not options.folder.is_dir() or not set(fields) <= set(FIELDS):
        parser.error(f"needs a folder, and --fields of {', '.join(FIELDS)}")
    for record in folder_facts(options.folder, fields):
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
