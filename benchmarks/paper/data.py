"""What the paper's benchmarks write: generated in its manner, or its own files.

Invariant: the same seed gives the same records. Token ids come from the model's own tokenizer.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memupdate.errors import UsageError
from memupdate.facts.model import Fact
from memupdate.facts.reader import read_facts
from memupdate.facts.render import Example, Renderer
from memupdate.resources import resource_dir

QUESTION = "Please output the content of the vector memory injected into the activations."
"""What the paper asks a passage by."""
_FIRST = """
Ada Alan Amy Ann Ben Bob Carl Carol Cora Dan Dora Ed Ella Emma Eric Eva Fay Fred Gail Gary Gina Greg Hal Hans Ida Iris
Ivan Jack Jane Joan John June Karl Kate Ken Kim Lars Lena Leo Lily Lisa Lou Luke Mark Mary Max Mia Mike Nina Noah Nora
Olga Omar Otto Paul Pia Ray Rita Rob Rosa Ruth Sam Sara Sue Tim Tina Tom Uma Vera Walt Will Zoe
"""
_LAST = """
Adams Allen Baker Barnes Bell Berg Blake Boyd Brooks Brown Burke Byrne Carter Clark Cole Cook Cox Cruz Davis Dean Diaz
Dixon Doyle Dunn Ellis Evans Field Fisher Ford Foster Fox Frank Gibson Gomez Grant Gray Green Hall Hart Hayes Hill
Holt Hunt James Jones Kelly Kent King Klein Knox Lane Lee Lewis Long Lopez Lynch Mann Mason Miller Moore Nash Nolan
Olson Owens Page Park Perez Price Quinn Reed Rice Rose Ross Ryan Scott Shaw Silva Smith Stone Tate Todd Vance Vega
Wade Walsh Ward Webb West White Wood Wolf Young Zane
"""


@dataclass(frozen=True)
class Passage:
    """One long text to learn by heart."""

    question: str
    text: str


def phonebook(count: int, *, seed: int) -> list[Fact]:
    """`count` entries, `Jane Doe:` → ten random digits, in the manner of the paper's random subset."""
    rng = random.Random(f"phonebook-{seed}")
    names = [f"{first} {last}" for first, last in itertools.product(_FIRST.split(), _LAST.split())]
    rng.shuffle(names)
    middle = (f"{name.replace(' ', f' {letter}. ')}" for letter in "ABCDEFGHJKLMNOPRSTW" for name in names)
    chosen = list(itertools.islice(itertools.chain(names, middle), count))
    return [Fact(f"{name}:", f"{rng.randrange(2, 10)}{rng.randrange(10**9):09d}") for name in chosen]


def read_phonebook(path: Path) -> list[Fact]:
    """The entries of one of the paper's files. Raises FactsError."""
    return [located.fact for located in read_facts(path).facts]


def prefix_of(examples: Sequence[Example], target_tokens: int) -> list[Example]:
    """The first examples whose targets have `target_tokens` together, the last one included.

    Raises:
        UsageError: there are not so many.
    """
    total = 0
    for count, example in enumerate(examples, start=1):
        total += len(example.target_ids)
        if total >= target_tokens:
            return list(examples[:count])
    raise UsageError(f"the data has {total} target tokens, {target_tokens} are asked for", "give fewer --lengths")


def read_passages(path: Path) -> list[Passage]:
    """The passages of one of the paper's long-context files, `{"question": …, "matching": …}` a line.

    Raises:
        UsageError: a line is not of that form.
    """
    passages = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            passages.append(Passage(str(row["question"]), str(row["matching"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}:{number}: not a passage ({error})", 'each line is {"question": …, "matching": …}'
            ) from error
    return passages


def prose(seed: int) -> str:
    """A long text that no base model knows: questions and answers of the embedded model's invented world, in random order."""
    facts = read_facts(resource_dir("atlas") / "calibration-facts.jsonl").facts
    sentences = [f"{located.fact.prompt} {located.fact.target}." for located in facts]
    random.Random(f"prose-{seed}").shuffle(sentences)
    return " ".join(sentences)


def passage_example(
    renderer: Renderer, passage: Passage, tokens: int, *, noise: float, seed: int, ordinary: Sequence[int]
) -> Example:
    """The first `tokens` tokens of a passage as one target, end token included.

    Args:
        renderer: of the model.
        passage: as text.
        tokens: ℓ.
        noise: share of the tokens that random ones stand for, as in the paper's r0 … r100.
        seed: of the noise.
        ordinary: ids that noise is drawn from.

    Raises:
        UsageError: the passage is shorter, or longer than the model's context.
    """
    style = renderer.resolve("auto")
    ids = renderer.tokenizer.encode(passage.text, add_special_tokens=False)[: tokens - 1]
    if len(ids) < tokens - 1:
        raise UsageError(f"the passage has {len(ids)} tokens, {tokens} are asked for", "give fewer --lengths")
    rng = random.Random(f"noise-{seed}")
    ids = [rng.choice(ordinary) if rng.random() < noise else token for token in ids]
    end = renderer.chat_end if style == "chat" else int(renderer.tokenizer.eos_token_id)
    example = Example(
        passage.question, style, passage.question, "", renderer.prompt_ids(passage.question, style), (*ids, end)
    )
    if renderer.context and example.length > renderer.context:
        raise UsageError(f"{example.length} tokens, but the model takes {renderer.context}", "give smaller --lengths")
    return example


def ordinary_tokens(renderer: Renderer, vocabulary: int) -> list[int]:
    """Ids below `vocabulary` that stand for text."""
    special = set(getattr(renderer.tokenizer, "all_special_ids", ()))
    return list(_textual(renderer, [token for token in range(vocabulary) if token not in special]))


def _textual(renderer: Renderer, ids: Sequence[int]) -> Iterator[int]:
    decode = renderer.tokenizer.decode  # type: ignore[attr-defined]
    return (token for token in ids if decode([token]).strip().isprintable() and decode([token]).strip())
