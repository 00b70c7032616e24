"""Placements resolved on a base model's `config.json`: which matrices are adapted, under their names in the model, and
their sizes.

Invariant: nothing but the config is read, so a plan needs no weights. What it does not know: quantised or expert
layers; a model type that is not listed is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memupdate.budget.plan import PlacementShape
from memupdate.errors import ModelError, PolicyError

PLACEMENTS = ("mlp-all", "mlp-one", "mlp-last", "all-linear")
"""`mlp-all`: the MLPs of all layers. `mlp-one`: the MLP of one layer at 60 % depth, as in arXiv 2605.30260.
`mlp-last`: the MLP of the last layer, above which no token looks at another, so that the cache holds all but that MLP and the head.
`all-linear`: MLPs and attention of all layers."""

AUTO = "auto"
"""Of a policy: whichever placement the plan finds cheapest."""

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose decoder layers all have `self_attn.{q,k,v,o}_proj` and `mlp.{gate,up,down}_proj` under
`model.layers.<i>`."""


def resolve_placement(name: str, config: Mapping[str, Any]) -> PlacementShape:
    """The matrices that placement `name` adapts on the model that `config` (its `config.json`) describes.

    Raises:
        PolicyError: there is no such placement.
        ModelError: the model type is not supported, or the config lacks a size.
    """
    if name not in PLACEMENTS:
        raise PolicyError(f"memory.placement: {name!r} is not a placement", f"choose one of {', '.join(PLACEMENTS)}")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelError(
            f"model type {model_type!r} is not supported",
            f"supported are {', '.join(SUPPORTED_MODEL_TYPES)} (text models)",
        )
    layers = _size(config, "num_hidden_layers")
    # Whole-number arithmetic: 0.6 * layers can round to just below a whole layer.
    chosen = {"mlp-one": [layers * 3 // 5], "mlp-last": [layers - 1]}.get(name, list(range(layers)))
    matrices: list[tuple[str, int, int]] = []
    for layer in chosen:
        if name == "all-linear":
            matrices += _attention(layer, config)
        matrices += _mlp(layer, config)
    return PlacementShape(name, tuple(matrices))


def _mlp(layer: int, config: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    hidden, inner = _size(config, "hidden_size"), _size(config, "intermediate_size")
    prefix = f"model.layers.{layer}.mlp"
    return [
        (f"{prefix}.gate_proj", hidden, inner),
        (f"{prefix}.up_proj", hidden, inner),
        (f"{prefix}.down_proj", inner, hidden),
    ]


def _attention(layer: int, config: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    # Qwen3 and some Mistrals have a head size of their own; elsewhere it is absent or null and follows from the width.
    head = _size(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
    prefix = f"model.layers.{layer}.self_attn"
    return [
        (f"{prefix}.q_proj", hidden, heads * head),
        (f"{prefix}.k_proj", hidden, kv_heads * head),
        (f"{prefix}.v_proj", hidden, kv_heads * head),
        (f"{prefix}.o_proj", heads * head, hidden),
    ]


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"config.json: {key} is {value!r}, not a positive whole number", "is this the model's own config.json?"
        )
    return value
