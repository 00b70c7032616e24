"""A base model shared out among the processes of a launch, through PyTorch's FSDP2: each keeps its share of every decoder layer's weights.

Invariant: a layer's attention or MLP is whole in a process only while it is run there. Where all train, all run the same parts in the same
order, and FSDP gathers each for all; where the first process runs the model alone (proofs, anchors, answers), it calls the others before
each part, and they lend their shares and listen again. Embeddings, norms, the head and any LoRA on top are whole everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from memupdate.distributed.meeting import engage, is_engaged, release, tell
from memupdate.distributed.team import Team
from memupdate.errors import ModelError

if TYPE_CHECKING:
    from memupdate.models.base import Source


@dataclass(frozen=True)
class Join:
    """Told to the other processes: build the model of `source` and take shares of it."""

    source: Source


@dataclass(frozen=True)
class Lend:
    """Told to the other processes: lend the shares of one part of the model of `source`, for one forward pass of the first process."""

    source: Source
    number: int


def share_out(model: nn.Module, team: Team, device: torch.device) -> None:
    """Split the first process's weights among all; every process calls it, and ends with its shares on `device`.

    Part by part: no device ever holds more than its shares, one whole part, and what is not shared out.

    Args:
        model: frozen; with its weights in the first process, on the meta device in the others.

    Raises:
        ModelError: it has no decoder layers of attention and MLP.
    """
    mesh = init_device_mesh(device.type, (team.size,))
    for part in parts(model):
        _send(part, device)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # Once outside of inference mode, as what FSDP gathers into must not be made inside of it.
        _gather(part)
    _send(model, device)
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def call_others(model: nn.Module, source: Source) -> None:
    """The first process: before it runs a part alone, tell the others to lend it."""
    for number, part in enumerate(parts(model)):
        _call_for(part, Lend(source, number))


def lend_part(model: nn.Module, number: int) -> None:
    """Another process's answer to `Lend`."""
    _gather(list(parts(model))[number])


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: attention, then MLP, of each decoder layer. Raises ModelError where there are none."""
    layers: Any = getattr(getattr(model, "model", None), "layers", None)
    if not layers or not all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers):
        raise ModelError(
            "this model has no decoder layers that could be shared out", 'set resources.sharding = "none" in the policy'
        )
    for layer in layers:
        yield from (layer.self_attn, layer.mlp)


def _call_for(part: nn.Module, message: Lend) -> None:
    has_called = False

    def call(*_: Any) -> None:
        nonlocal has_called
        if not is_engaged():
            engage()
            has_called = True
            tell(message)

    def gathered(*_: Any) -> None:
        nonlocal has_called
        if has_called:
            has_called = False
            release()

    # FSDP gathers in a hook of its own, which stands between these.
    part.register_forward_pre_hook(call, prepend=True)
    part.register_forward_pre_hook(gathered)


def _gather(part: nn.Module) -> None:
    assert isinstance(part, FSDPModule)
    part.unshard()
    part.reshard()


def _send(root: nn.Module, device: torch.device) -> None:
    """All weights and buffers under `root` that are not shared out yet, from the first process to all, onto `device`."""
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor):
                module._parameters[name] = nn.Parameter(_sent(parameter, device), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _sent(buffer, device)


@torch.no_grad()
def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    here = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device).contiguous()
    dist.broadcast(here, 0)
    return here
