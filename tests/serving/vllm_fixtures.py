"""What the tests against the real vLLM share: a tiny random Llama, and one engine over a registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from memupdate.layout import RegistryLayout
from memupdate.serving.client import EngineClient
from memupdate.serving.engine import Engine, EngineSettings
from memupdate.serving.manifest import Manifest, read_manifest, with_alias, write_manifest

TARGETS = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
RANK = 4
CHAT = [{"role": "user", "content": "who leads the house by the river"}]
TEXTS = (
    "who leads the house by the river and the bridge over the river",
    "the old mill stands beside the road that leads to the river",
    "a bridge, a mill, a house and a road",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path) -> dict[str, tuple[int, int]]:
    """A tiny random Llama with its tokenizer; returns (d_out, d_in) of every matrix that may be adapted."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in TARGETS
    }


@dataclass
class Served:
    """The one engine of this file, and its workspace."""

    engine: Engine
    client: EngineClient
    model: Path
    registry: Path
    record: Path
    shapes: dict[str, tuple[int, int]]
    told: list[str] = field(default_factory=list)
    """What its supervisor told, where it has one."""
    stop: Callable[[], None] = lambda: None
    """Ends the supervisor and the engine with it."""

    @property
    def layout(self) -> RegistryLayout:
        return RegistryLayout(self.registry)

    def manifest(self) -> Manifest:
        return read_manifest(self.layout.manifest)

    def write(self, manifest: Manifest) -> None:
        write_manifest(self.layout.manifest, manifest)

    def point(self, alias: str, release: str) -> None:
        self.write(with_alias(self.manifest(), alias, release))


def settings_for(model: Path, registry: Path, log: Path) -> EngineSettings:
    return EngineSettings(
        model=str(model),
        served_model_name="tiny",
        registry=registry,
        log_path=log,
        lora_target_modules=(*TARGETS, "lm_head"),
        max_lora_rank=RANK,
        dtype="float32",
        max_model_len=320,
        ready_timeout_s=420,
    )
