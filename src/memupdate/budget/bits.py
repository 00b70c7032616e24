"""How much information a memory stores, against what is known to fit into a parameter.

Invariant: bits are the base model's own loss on the targets: what it already knows costs nothing.
"""

from __future__ import annotations

import math

KNOWLEDGE_BITS_PER_PARAMETER = 2.0
"""About what a model stores as retrievable knowledge after long training: Allen-Zhu and Li, "Physics of Language
Models: Part 3.3, Knowledge Capacity Scaling Laws", arXiv 2404.05405."""

MEMORISATION_BITS_PER_PARAMETER = 3.6
"""About what a GPT-style model memorises of random data at most: Morris et al., "How much do language models
memorize?", arXiv 2505.24832."""


def bits_stored(base_loss_nats: float, target_tokens: int) -> float:
    """Information to store, in bits: `base_loss · ℓ / ln 2`, with the base loss in nats per target token."""
    return max(0.0, base_loss_nats) * target_tokens / math.log(2)


def bits_per_parameter(stored_bits: float, effective_parameters: int) -> float:
    """Density of a memory, in bits per effective parameter."""
    return stored_bits / effective_parameters
