"""The memory: a LoRA whose `A` is random, seeded and frozen, and whose `B` holds the facts; its growth, its slices, its file form.

Invariants: growing computes exactly what was computed before (new columns of `B` are zero); `A` depends on seed, matrix and row
only, so that a memory of rank 16 begins with the rows of one of rank 8; the LoRA scaling is folded into `A`, so alpha = r
everywhere and what is trained, written, and served is the same numbers. Knows nothing of facts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from memupdate.budget.plan import PlacementShape
from memupdate.layout import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, SLICE_WEIGHTS_FILE

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Memory:
    """LoRA tensors by matrix name, float32 on the CPU."""

    rank: int
    a: dict[str, Tensor]
    """(rank, d_in) each."""
    b: dict[str, Tensor]
    """(d_out, rank) each."""

    @property
    def parameters(self) -> int:
        """Numbers stored: `r · Σ (d_in + d_out)`."""
        return sum(t.numel() for tensors in (self.a, self.b) for t in tensors.values())


def basis_rows(name: str, d_in: int, first: int, last: int, *, seed: str, scale: float) -> Tensor:
    """Rows `first … last-1` of `A` for one matrix, (last − first, d_in), normal with deviation `scale / sqrt(d_in)`.

    Each row has a generator of its own, so that growth never changes a row that is there.
    """
    rows = []
    for index in range(first, last):
        digest = hashlib.sha256(f"memupdate-basis:{seed}:{name}:{index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.randn(d_in, generator=generator))
    return torch.stack(rows) * (scale / math.sqrt(d_in)) if rows else torch.empty(0, d_in)


def empty_memory(shape: PlacementShape) -> Memory:
    """A memory of rank 0 over the placement; `grow` gives it room."""
    return Memory(
        0,
        {name: torch.empty(0, d_in) for name, d_in, _ in shape.matrices},
        {name: torch.empty(d_out, 0) for name, _, d_out in shape.matrices},
    )


def grow(memory: Memory, rank: int, *, seed: str, scale: float) -> Memory:
    """The same function with room for more: new random rows of `A`, zero columns of `B`. Raises ValueError to shrink."""
    if rank < memory.rank:
        raise ValueError(f"a memory of rank {memory.rank} cannot shrink to {rank}")
    a = {
        name: torch.cat([old, basis_rows(name, old.shape[1], memory.rank, rank, seed=seed, scale=scale)])
        for name, old in memory.a.items()
    }
    return Memory(rank, a, {name: _widen(old, rank) for name, old in memory.b.items()})


def _widen(b: Tensor, rank: int) -> Tensor:
    """`B` with zero columns up to `rank`."""
    return torch.cat([b, torch.zeros(b.shape[0], rank - b.shape[1])], dim=1)


def lora_config(memory: Memory) -> LoraConfig:
    """An ordinary PEFT configuration: alpha = r, so that the scaling is 1 and all of the function is in `A` and `B`."""
    return LoraConfig(
        r=memory.rank,
        lora_alpha=memory.rank,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=sorted(memory.a),
    )


def attach(model: PreTrainedModel, memory: Memory, *, train_basis: bool = False) -> PeftModel:
    """Wrap `model` with the memory through PEFT; only `B` (and `A` with `train_basis`) asks for gradient. Undo with `detach`."""
    peft_model = get_peft_model(model, lora_config(memory), adapter_name=ADAPTER, autocast_adapter_dtype=True)
    with torch.no_grad():
        for name, layer in lora_layers(peft_model).items():
            layer.lora_A[ADAPTER].weight.copy_(memory.a[name])
            layer.lora_B[ADAPTER].weight.copy_(memory.b[name])
            layer.lora_A[ADAPTER].weight.requires_grad_(train_basis)
            layer.forward = _forward_of(layer)
    return peft_model


def _forward_of(layer: Any) -> Callable[..., Tensor]:
    """`x W + x Aᵀ Bᵀ` as PEFT computes it for one adapter at scaling 1 without dropout, with fewer passes over the result."""
    frozen, a, b = layer.base_layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    in_place = type(frozen) is nn.Linear  # others may keep what they return for their backward pass

    def forward(x: Tensor) -> Tensor:
        out: Tensor = frozen(x)
        if layer.disable_adapters:  # `disable_adapter()`: the base model alone
            return out
        low = functional.linear(x.to(a.dtype), a)
        if out.dtype != b.dtype:  # a bfloat16 model: the adapter's part is added before it is rounded
            return (out + functional.linear(low, b)).to(out.dtype)
        if in_place:
            out.view(-1, out.shape[-1]).addmm_(low.flatten(0, -2), b.t())
            return out
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), b.t()).view(out.shape)

    return forward


def detach(peft_model: PeftModel) -> PreTrainedModel:
    """Remove the LoRA layers again; the base weights were never touched."""
    model: PreTrainedModel = peft_model.unload()
    # PEFT leaves its configuration on the model and would warn of a second adapter at the next `attach`.
    model.__dict__.pop("peft_config", None)
    return model


def lora_layers(peft_model: PeftModel) -> dict[str, Any]:
    """PEFT's LoRA layers by matrix name of the base model."""
    return {
        name.removeprefix(_PEFT_PREFIX): module
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A")
    }


def read_memory(peft_model: PeftModel) -> Memory:
    """Copy the tensors out of an attached memory."""
    layers = lora_layers(peft_model)
    a = {n: layer.lora_A[ADAPTER].weight.detach().float().cpu().clone() for n, layer in layers.items()}
    b = {n: layer.lora_B[ADAPTER].weight.detach().float().cpu().clone() for n, layer in layers.items()}
    return Memory(next(iter(a.values())).shape[0], a, b)


def make_slice(before: Memory, after: Memory) -> dict[str, Tensor]:
    """What a batch changed: per matrix `ΔB` (d_out, rank after), the added rows of `A`, and `ΔA` where the basis was trained."""
    tensors: dict[str, Tensor] = {}
    for name, a in after.a.items():
        tensors[f"{name}.delta_B"] = after.b[name] - _widen(before.b[name], after.rank)
        tensors[f"{name}.added_A"] = a[before.rank :].clone()
        delta_a = a[: before.rank] - before.a[name]
        if delta_a.any():
            tensors[f"{name}.delta_A"] = delta_a
    return tensors


def apply_slice(before: Memory, tensors: dict[str, Tensor]) -> Memory:
    """The memory after a batch. This, not the trainer's state, is what is proved and released (adding ΔB rounds)."""
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for name in before.a:
        delta_b = tensors[f"{name}.delta_B"]
        old_a = before.a[name] + tensors[f"{name}.delta_A"] if f"{name}.delta_A" in tensors else before.a[name]
        a[name] = torch.cat([old_a, tensors[f"{name}.added_A"]])
        b[name] = _widen(before.b[name], delta_b.shape[1]) + delta_b
    return Memory(next(iter(a.values())).shape[0], a, b)


def save_slice(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write a slice's tensors into an existing folder."""
    # Through Python's own file, since safetensors' writer hides a full disk in an error of its own.
    (folder / SLICE_WEIGHTS_FILE).write_bytes(save({k: v.contiguous() for k, v in tensors.items()}))


def load_slice(folder: Path) -> dict[str, Tensor]:
    """Read what `save_slice` wrote."""
    return load_file(folder / SLICE_WEIGHTS_FILE)


def save_adapter(folder: Path, memory: Memory, *, base_model: str) -> None:
    """Write the memory as one ordinary PEFT adapter into an existing folder."""
    tensors = {f"{_PEFT_PREFIX}{n}.lora_A.weight": t.contiguous() for n, t in memory.a.items()}
    tensors |= {f"{_PEFT_PREFIX}{n}.lora_B.weight": t.contiguous() for n, t in memory.b.items()}
    (folder / ADAPTER_WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    config = lora_config(memory)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    (folder / ADAPTER_CONFIG_FILE).write_text(
        json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )


def load_adapter(folder: Path) -> Memory:
    """Read a released adapter back as a memory."""
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / ADAPTER_WEIGHTS_FILE).items():
        name, _, part = key.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        (a if part == "A.weight" else b)[name] = tensor.float()
    return Memory(next(iter(a.values())).shape[0], a, b)
