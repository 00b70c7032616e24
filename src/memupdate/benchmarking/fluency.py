"""Fluency as the field measures it: entropy of a long free continuation's n-grams; a broken model repeats itself, and it falls.

`H_n = −Σ f(k) log2 f(k)` over a text's n-grams `k` with relative frequency `f`, and `(2/3 · H_2 + 4/3 · H_3) / 2` of one text; the
mean over texts (Meng et al., "Locating and Editing Factual Associations in GPT", 2022: the "generation entropy" GE, after Zhang et al.
2018). They split words with NLTK; here words and punctuation marks are split by a regular expression, which differs in contractions.
Torch-free.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+|[^\w\s]")
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""By n."""


def n_gram_entropy(text: str) -> float:
    """Weighted mean entropy of a text's bigrams and trigrams, bits; 0 for a text of fewer than three words."""
    words = _WORD.findall(text)
    return sum(weight * _entropy(words, n) for n, weight in _WEIGHTS.items()) / len(_WEIGHTS)


def mean_entropy(texts: Sequence[str]) -> float:
    """Of several texts, bits; 0 for none."""
    return sum(map(n_gram_entropy, texts)) / len(texts) if texts else 0.0


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())
