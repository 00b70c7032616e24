"""The base model in memory: weights, tokenizer, device and dtype, loaded through transformers. Weights here are never changed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from memupdate.distributed.launch import current_launch
from memupdate.distributed.meeting import current_team, tell
from memupdate.errors import ModelError
from memupdate.models.folder import ModelFolder
from memupdate.models.sharding import Join, call_others, parts, share_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a base model came from, so that another process can load the same."""

    folder: Path
    dtype: str
    quantization: str = "none"
    is_sharded: bool = False
    """Shared out among the processes of a launch."""

    def load(self) -> BaseModel:
        """As `load_base`, all of it in this process."""
        return load_base(ModelFolder(self.folder), dtype=self.dtype, quantization=self.quantization)


@dataclass
class BaseModel:
    """A frozen causal language model in evaluation mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    source: Source | None = None
    """None for one that was made in memory."""
    lower_layers: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What its lower layers gave for texts seen before, by where they end (`training.lower_layers`); true as its weights never change."""

    @property
    def is_sharded(self) -> bool:
        """Whether a pass through it takes the other processes of the launch."""
        return self.source is not None and self.source.is_sharded


def pick_device() -> torch.device:
    """The first GPU where there is one, else the CPU; of several processes that train together, each has a GPU of its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    launch = current_launch()
    return torch.device("cuda") if launch is None else torch.device("cuda", launch.local_rank)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` means bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def quantized_options(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers is told to load the linear layers in 8 or 4 bits; nothing for `none`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'resources.quantization = "{quantization}" needs bitsandbytes, which is not installed',
            'pip install bitsandbytes, or set it to "none" in the policy',
        )
    return {"quantization_config": bits_config(quantization, dtype), "device_map": {"": device}}


def bits_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """`8bit`: LLM.int8(). `4bit`: NF4 with quantised scales (QLoRA), computed in `dtype`."""
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load_base(
    folder: ModelFolder, *, dtype: str = "auto", quantization: str = "none", sharding: str = "none"
) -> BaseModel:
    """Load weights and tokenizer from a local folder, frozen, onto the best device.

    Args:
        sharding: `fsdp` shares the weights out among the processes of a launch (`models.sharding`); one process alone has them all.

    Raises:
        ModelError: transformers cannot load it, it does not fit into memory, or it cannot be quantised or shared out here.
    """
    device, team = pick_device(), current_team() if sharding == "fsdp" else None
    if team is None:
        model = _read(folder, dtype, quantization, device)
        return BaseModel(model, _read_tokenizer(folder), device, Source(folder.path, dtype, quantization))
    if quantization != "none":
        raise ModelError(
            "a quantised base model cannot be shared out",
            'set resources.sharding or resources.quantization to "none" in the policy',
        )
    source = Source(folder.path, dtype, is_sharded=True)
    model, tokenizer = _read(folder, dtype, quantization, torch.device("cpu")), _read_tokenizer(folder)
    next(parts(model))  # what fails must fail before the others are told
    tell(Join(source))
    share_out(model, team, device)
    call_others(model, source)
    return BaseModel(model, tokenizer, device, source)


def join_shards(source: Source) -> BaseModel:
    """A base model that the first process of a launch shares out, in another one: as its `load_base`, reading no weights."""
    team, device = current_team(), pick_device()
    assert team is not None  # or nobody would have told
    config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=pick_dtype(source.dtype, device))
    model.eval().requires_grad_(False)
    share_out(model, team, device)
    return BaseModel(model, _read_tokenizer(ModelFolder(source.folder)), device, source)


def _read_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except Exception as error:
        raise _unreadable(folder, error) from error
    return tokenizer


def _read(folder: ModelFolder, dtype: str, quantization: str, device: torch.device) -> PreTrainedModel:
    """The model, frozen, in evaluation mode, on `device`; its dtype is that of the device it will run on."""
    number = pick_dtype(dtype, pick_device())
    options = quantized_options(quantization, number, device)
    transformers_logging.disable_progress_bar()  # progress is ours to show
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=number, local_files_only=True, output_loading_info=True, **options
        )
        if not options:  # else it is there already, and may not be moved
            model.to(device)
    except Exception as error:  # broken files surface as errors of safetensors, torch, the hub client and transformers
        raise _unreadable(folder, error) from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers in their place
        raise ModelError(
            f"{folder.path}: {len(missing)} tensors are missing from the weights, {missing[0]} first",
            "a file of the weights is missing, or config.json is another model's: download it again",
        )
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def _unreadable(folder: ModelFolder, error: Exception) -> ModelError:
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ModelError(f"{folder.path}: cannot be loaded ({first_line})", "check the folder, or the memory that is free")
