"""What clients get of a release beyond its facts' own prompts, for reports: by phrasing, by neighbourhood, on general text, by token.

Invariant: the same figures in terminal, page and Markdown; texts of facts come out of `texts.shown` only. Rendering is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memupdate.ledger.measures import FactTokens, MeasureCount, TokenRecord
from memupdate.reports import texts
from memupdate.reports.content import ReleaseMeasures

COLUMNS = ("measure", "asked as", "asked", "exact", "normalised", "contained", "least sure token")
JUDGED = (
    "Exact: to the character, and then it stops. Normalised: but for case, spaces and closing punctuation. Contained: somewhere in a "
    "longer answer. A guess is what the base model itself was not sure of."
)


@dataclass(frozen=True)
class TokenCell:
    """One token of a strip."""

    text: str
    probability: str
    level: str
    """`failed` where another token is likelier, else `p0` to `p4` from unsure to sure."""
    instead: str
    """The likelier token; "" for none."""


@dataclass(frozen=True)
class TokenStrip:
    """One fact's answer, token by token."""

    prompt: str
    target: str
    cells: tuple[TokenCell, ...]


def measure_rows(counts: Sequence[MeasureCount]) -> tuple[tuple[str, ...], ...]:
    """Rows of `COLUMNS`."""
    return tuple(
        (
            count.measure if count.engine == "in-process" else f"{count.measure}, as served",
            count.part,
            f"{count.asked:,}",
            *(texts.percent(n / count.asked) for n in (count.exact, count.normalised, count.contained)),
            texts.number(count.min_probability),
        )
        for count in counts
        if count.asked
    )


def summary_sentence(measures: ReleaseMeasures) -> str:
    """The release in one sentence."""
    parts = []
    if measures.generality_share is not None:
        parts.append(
            f"{texts.percent(measures.generality_share)} of the phrasings that were not trained on are answered word for word"
        )
    if measures.locality_share is not None:
        parts.append(f"{texts.percent(measures.locality_share)} of what must stay is answered as before")
    if measures.text is not None and measures.perplexity_ratio is not None:
        corpus, kl = texts.shown(measures.text.corpus, 60), texts.number(measures.text.kl_nats)
        parts.append(f"perplexity of general text ({corpus}) {100 * (measures.perplexity_ratio - 1):+.2f} %, KL {kl}")
    return (
        f"{measures.release}: {'; '.join(parts)}."
        if parts
        else f"{measures.release} was not measured beyond its proofs."
    )


def token_strips(tokens: Sequence[FactTokens], limit: int) -> tuple[TokenStrip, ...]:
    """The least sure facts' answers, token by token."""
    return tuple(
        TokenStrip(texts.shown(fact.prompt), texts.shown(fact.target), tuple(_cell(token) for token in fact.tokens))
        for fact in tokens[:limit]
    )


def _cell(token: TokenRecord) -> TokenCell:
    best = token.token == token.best_token
    level = f"p{min(4, max(0, int(10 * token.probability) - 5))}" if best else "failed"
    return TokenCell(_token(token.token), f"{token.probability:.2f}", level, "" if best else _token(token.best_token))


def _token(text: str | None) -> str:
    """A token as it can be seen: its blanks are part of it."""
    if text is None:
        return "purged"
    return texts.shown(text.replace(" ", "␣").replace("\n", "⏎"), 40) or "(empty)"
