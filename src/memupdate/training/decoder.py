"""A Llama-shaped decoder taken apart: run from any point to any other, on sequences side by side without padding.

Invariant: from the embeddings to the end it gives the model's own hidden states to rounding. Its modules are called as they are, so that
whatever stands in their place (LoRA, quantised weights) works. Only attention sees a padded grid, and causal attention keeps what
stands right of a token from it. Knows neither facts nor what is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from memupdate.budget.placement import SUPPORTED_MODEL_TYPES

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Others turn a position by the longest sequence of its batch, which is not the same in every batch."""
_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_LAYERS = "model.layers."
_SCALED = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@dataclass(frozen=True)
class Cut:
    """A point in the decoder: before layer `layer`, or between its attention and its MLP."""

    layer: int
    after_attention: bool = False

    @property
    def is_bottom(self) -> bool:
        """Nothing but the embeddings lies below."""
        return self.layer == 0 and not self.after_attention


def lowest_adapted(names: Iterable[str]) -> Cut | None:
    """The highest cut with all matrices `names` above it; None where one of them is of no decoder layer."""
    found = []
    for name in names:
        number, _, part = name.removeprefix(_LAYERS).partition(".")
        if not name.startswith(_LAYERS) or not number.isdigit():
            return None
        found.append((int(number), part.startswith("mlp.")))
    return Cut(*min(found)) if found else None


@dataclass(frozen=True)
class Rows:
    """`B` sequences of token ids side by side, `N` tokens in all, the longest of `W`."""

    ids: tuple[tuple[int, ...], ...]

    @cached_property
    def width(self) -> int:
        """W."""
        return max(len(row) for row in self.ids)

    @cached_property
    def tokens(self) -> int:
        """N."""
        return sum(len(row) for row in self.ids)

    @cached_property
    def grid(self) -> Tensor | None:
        """(N,) int64: the place of each token in a padded grid of B · W; None where nothing is padded."""
        if self.tokens == len(self.ids) * self.width:
            return None
        with torch.inference_mode(False):  # kept with the rows, which may be trained on after they were scored
            lengths = torch.tensor([len(row) for row in self.ids])
            return (torch.arange(self.width) < lengths[:, None]).flatten().nonzero()[:, 0]

    def flat(self) -> Tensor:
        """(N,) int64: all token ids."""
        return torch.tensor([token for row in self.ids for token in row])

    def tails(self, first: Sequence[int]) -> Tensor | None:
        """Indices (n,) among the N tokens of those from `first[i]` on in each sequence; None for all."""
        if not any(first):
            return None
        index: list[int] = []
        start = 0
        for row, skipped in zip(self.ids, first, strict=True):
            index += range(start + skipped, start + len(row))
            start += len(row)
        return torch.tensor(index, dtype=torch.long)


class Decoder:
    """A causal language model of a supported type by its parts; make it with `take_apart`."""

    def __init__(self, model: nn.Module) -> None:
        body: Any = model.model
        self.config: Any = model.config
        self.embed, self.rotary, self.norm = body.embed_tokens, body.rotary_emb, body.norm
        self.layers = list(body.layers)
        self.head: nn.Module = model.get_output_embeddings()
        self.device: torch.device = self.embed.weight.device

    def embeddings(self, rows: Rows) -> Tensor:
        """(N, D): where every pass begins."""
        return self.embed(rows.flat().to(self.device))

    def run(
        self,
        hidden: Tensor,
        rows: Rows,
        *,
        start: Cut,
        stop: Cut | None = None,
        wanted: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Hidden states from `start` to `stop`, or, normed for the head, to the end.

        Args:
            hidden: (N, D) at `start`.
            rows: whose they are.
            start, stop: cuts, the first not above the other.
            wanted: (n,) int64: tokens whose last hidden state is asked for; all by default. Used without `stop` only.
            recompute: keep each layer's input alone and run it again for its gradient (gradient checkpointing).

        Returns:
            (N, D) at `stop`, or (n, D).
        """
        context = _Context(self, hidden, rows)
        last = len(self.layers) - 1

        def layer(number: int, hidden: Tensor) -> Tensor:
            module = self.layers[number]
            if number > start.layer or not start.after_attention:
                hidden = hidden + context.attend(number, module, module.input_layernorm(hidden))
            if stop is not None and number == stop.layer:
                return hidden
            if number == last and stop is None and wanted is not None:
                hidden = hidden[wanted]
            return hidden + module.mlp(module.post_attention_layernorm(hidden))

        for number in range(start.layer, len(self.layers) if stop is None else stop.layer + stop.after_attention):
            if recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, number, hidden, use_reentrant=False)
            else:
                hidden = layer(number, hidden)
        return hidden if stop is not None else self.norm(hidden)

    def is_sliding(self, number: int) -> bool:
        """Whether a layer's attention sees a window only."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds:
            return kinds[number] == "sliding_attention"
        return self.config.model_type == "mistral" and self.config.sliding_window is not None


class _Context:
    """What the attention layers of one pass share; made when the first of them asks, as a pass above all attention has none."""

    def __init__(self, decoder: Decoder, hidden: Tensor, rows: Rows) -> None:
        self.decoder, self.rows = decoder, rows
        self.shape = (len(rows.ids), rows.width, hidden.shape[-1])
        self.like = hidden.detach().new_empty(()).expand(self.shape)
        self.masks: dict[bool, Any] = {}

    @cached_property
    def grid(self) -> Tensor | None:
        return None if self.rows.grid is None else self.rows.grid.to(self.like.device)

    @cached_property
    def positions(self) -> Tensor:
        return torch.arange(self.rows.width, device=self.like.device)[None]

    @cached_property
    def turns(self) -> Any:
        return self.decoder.rotary(self.like, self.positions)

    def mask(self, number: int) -> Any:
        """As the model itself makes it; pads stand on the right, where no token looks, and need none."""
        sliding = self.decoder.is_sliding(number)
        if sliding not in self.masks:
            make = create_sliding_window_causal_mask if sliding else create_causal_mask
            self.masks[sliding] = make(
                config=self.decoder.config, inputs_embeds=self.like, attention_mask=None, past_key_values=None,
                position_ids=self.positions,
            )  # fmt: skip
        return self.masks[sliding]

    def attend(self, number: int, module: Any, hidden: Tensor) -> Tensor:
        """(N, D) through a layer's attention."""
        padded = hidden
        if self.grid is not None:
            padded = hidden.new_zeros(self.shape[0] * self.shape[1], self.shape[2]).index_copy(0, self.grid, hidden)
        out = module.self_attn(
            hidden_states=padded.view(self.shape), position_embeddings=self.turns, attention_mask=self.mask(number),
            position_ids=self.positions, past_key_values=None,
        )[0].flatten(0, 1)  # fmt: skip
        return out if self.grid is None else out[self.grid]


def take_apart(model: nn.Module) -> Decoder | None:
    """The decoder of a causal language model, or None where it can only be run whole.

    None for types that are not known to be Llama-shaped, for rotary embeddings that depend on the batch, for logits that are changed behind
    the head, and where modules live on several devices.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in SUPPORTED_MODEL_TYPES or any(
        getattr(config, n, None) for n in _SCALED
    ):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if (
        rope.get("rope_type", "default") not in _ROPE_TYPES
        or len(set(getattr(model, "hf_device_map", {}).values())) > 1
    ):
        return None
    body: Any = getattr(model, "model", None)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    if not all(hasattr(body, p) for p in parts) or not all(hasattr(layer, p) for layer in body.layers for p in _PARTS):
        return None
    return Decoder(model)
