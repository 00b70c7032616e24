"""The base model in memory: weights, tokenizer, device and dtype, loaded through transformers. Weights here are never changed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from memupdate.errors import ModelError
from memupdate.launch import current_launch
from memupdate.models.folder import ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a base model came from, so that another process can load the same."""

    folder: Path
    dtype: str
    quantization: str = "none"

    def load(self) -> BaseModel:
        """As `load_base`."""
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


def load_base(folder: ModelFolder, *, dtype: str = "auto", quantization: str = "none") -> BaseModel:
    """Load weights and tokenizer from a local folder, frozen, onto the best device.

    Raises:
        ModelError: transformers cannot load it, it does not fit into memory, or it cannot be quantised here.
    """
    device = pick_device()
    options = quantized_options(quantization, pick_dtype(dtype, device), device)
    transformers_logging.disable_progress_bar()  # progress is ours to show
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=pick_dtype(dtype, device), local_files_only=True, output_loading_info=True, **options
        )
        if not options:  # else it is there already, and may not be moved
            model.to(device)
    except Exception as error:  # broken files surface as errors of safetensors, torch, the hub client and transformers
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{folder.path}: cannot be loaded ({first_line})", "check the folder, or the memory that is free"
        ) from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers in their place
        raise ModelError(
            f"{folder.path}: {len(missing)} tensors are missing from the weights, {missing[0]} first",
            "a file of the weights is missing, or config.json is another model's: download it again",
        )
    model.eval().requires_grad_(False)
    return BaseModel(model, tokenizer, device, Source(folder.path, dtype, quantization))
