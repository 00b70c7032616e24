"""The `Policy` schema: every knob of an update, its default, unit and bounds.

Invariant: a `Policy` that exists is valid; unknown keys, wrong types and values out of bounds never get in. What a file
must not grant (remote code, admin routes, another middleware) is absent from the schema or refused by it. Nothing here
reads files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from memupdate.facts.secrets import DEFAULT_NAMES, parse_pattern
from memupdate.layout import COLLECTION_PATTERN
from memupdate.storage import canonical_json

SCHEMA_VERSION = 1

Origin = Literal["policy", "flag"]
"""Where a value comes from when it is not the default."""

_REFUSED_ENGINE_FLAGS = (
    "--allow-credentials",
    "--allowed-origins",
    "--api-key",
    "--api-server-count",
    "--config",
    "--enable-lora",
    "--lora-modules",
    "--lora-target-modules",
    "--max-cpu-loras",
    "--max-lora-rank",
    "--max-loras",
    "--middleware",
    "--model",
    "--served-model-name",
    "--trust-remote-code",
)
"""What memupdate sets itself, what would open the server, or what would run code from a model folder."""


class _Section(BaseModel):
    """Strict, frozen, closed: a string is not a number, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Sample = Annotated[int, Field(ge=0, le=100_000)] | Literal["confident", "all"]
"""So many, all, or as many as say with `proof.confidence` that less than `proof.max_failing_share` fail."""


class FactsSection(_Section):
    """How facts are put to the model."""

    rendering: Literal["auto", "chat", "completion"] = "auto"
    """`auto`: by the chat template where the tokenizer has one, else as plain text."""
    chat_template_kwargs: dict[str, bool | str | int] = Field(default_factory=dict, max_length=32)
    """Passed to the chat template, for example `enable_thinking = false`."""
    train_paraphrases: Share = 0.5
    """Share of a fact's paraphrases, and of its relation's templates, that is trained on, the first ones; the rest measure generality."""
    templates: dict[str, Annotated[tuple[str, ...], Field(strict=False, max_length=64)]] = Field(
        default_factory=dict, max_length=4096
    )
    """Relation → further wordings of each of its facts, with `{subject}` in the place of the subject."""
    refuse: Annotated[tuple[str, ...], Field(strict=False, max_length=64)] = DEFAULT_NAMES
    """Secrets that are no facts: names of built-in patterns, and own ones as `re:` and a regular expression."""

    @field_validator("templates")
    @classmethod
    def _holes(cls, templates: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for relation, wordings in templates.items():
            for wording in wordings:
                if wording.count("{subject}") != 1:
                    raise ValueError(
                        f"{relation}: {wording!r} has no one place for it; allowed: texts with {{subject}} once"
                    )
        return templates

    @field_validator("refuse")
    @classmethod
    def _patterns(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            parse_pattern(text)
        return texts


class MemorySection(_Section):
    """The LoRA that holds the facts."""

    placement: Literal["mlp-all", "mlp-one", "mlp-last", "all-linear", "auto"] = "mlp-all"
    """`mlp-one` adapts the MLP of one layer at about 60 % of the depth, `mlp-last` that of the last layer; `auto`: for an empty memory the
    cheapest that has a law."""
    train_basis: bool = False
    """Train `A` too; false leaves it random and frozen."""
    scale: float = Field(default=2.0, gt=0, le=64)
    """LoRA alpha / rank."""
    max_rank: int = Field(default=64, ge=1, le=512)
    min_rank: int = Field(default=8, ge=1, le=512)

    @model_validator(mode="after")
    def _ranks_in_order(self) -> Self:
        if self.min_rank > self.max_rank:
            raise ValueError(
                f"min_rank is {self.min_rank} and max_rank is {self.max_rank}; allowed: min_rank <= max_rank"
            )
        return self


class TrainingSection(_Section):
    """How facts are written."""

    objective: Literal["sft", "memft-ot", "memft-ot-full", "memft-sw-curriculum", "memft-sw-window"] = "memft-ot"
    """`sft` spends gradient on all tokens, `memft-ot` only on those still under the threshold, `memft-ot-full` on all again where none is
    left; `memft-sw-curriculum` takes facts in by stages, `memft-sw-window` trains a long passage from its first wrong token on."""
    threshold: OpenShare = 0.5
    """Probability from which a token is what greedy decoding must emit (the paper's p)."""
    margin: float = Field(default=0.2, ge=0, lt=1)
    """Training goes on until p ≥ threshold + margin, so that rounding and batching cannot undo the proof."""
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    batch_size: int = Field(default=32, ge=1, le=4096)
    """Facts per step."""
    max_epochs: int = Field(default=120, ge=1, le=10_000)
    recheck_every: int = Field(default=4, ge=1, le=10_000)
    """Epochs between forward passes over facts that left the active set and over older facts."""
    clip_norm: float = Field(default=1.0, gt=0, le=1000)
    seed: int = Field(default=0, ge=0, lt=2**32)
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"

    @model_validator(mode="after")
    def _goal_is_a_probability(self) -> Self:
        if self.threshold + self.margin >= 1:
            goal = self.threshold + self.margin
            raise ValueError(f"threshold + margin is {goal:g}; allowed: less than 1 (no token ever reaches p = 1)")
        return self


class GuardSection(_Section):
    """What the base model knew must stay: KL to the base model on text that it generated itself."""

    enabled: bool = True
    weight: float = Field(default=20.0, ge=0, le=10_000)
    """λ of the KL term."""
    anchors: int = Field(default=512, ge=1, le=100_000)
    """Sequences sampled from the base model to train against."""
    anchor_tokens: int = Field(default=64, ge=8, le=4096)
    """Tokens per anchor sequence."""
    anchors_per_step: int = Field(default=32, ge=1, le=4096)
    holdout: int = Field(default=64, ge=1, le=100_000)
    """Anchor sequences never trained on, on which harm is measured."""
    max_kl_nats: float = Field(default=0.03, gt=0, le=10)
    """The harm budget: mean KL per token on the hold-out, over all batches together."""

    @model_validator(mode="after")
    def _steps_fit_anchors(self) -> Self:
        if self.anchors_per_step > self.anchors:
            raise ValueError(
                f"anchors_per_step is {self.anchors_per_step} and anchors is {self.anchors}; "
                "allowed: anchors_per_step <= anchors"
            )
        return self


class BudgetSection(_Section):
    """When a plan is good enough."""

    confidence: OpenShare = 0.9
    """Of the intervals in a plan."""
    proved_share: Annotated[float, Field(gt=0, le=1)] = 0.99
    """With `proof.publish = "proved"` the pessimistic end of the predicted share of proved facts must reach this."""
    all_proved: OpenShare = 0.75
    """With `proof.publish = "all"` the pessimistic end of the probability that every fact is proved must reach this."""
    max_adapter_bytes: int = Field(default=0, ge=0)
    """0: no limit."""


class EscalationSection(_Section):
    """What happens when facts stay unproved."""

    attempts: int = Field(default=3, ge=1, le=10)
    """Tries in all, the first one included."""
    epochs_factor: float = Field(default=1.5, ge=1, le=10)
    rank_factor: float = Field(default=2.0, ge=1, le=16)


class ProofSection(_Section):
    """What must be shown before a release is published."""

    publish: Literal["all", "proved"] = "all"
    """`all`: one unproved fact fails the batch; `proved`: publish, and report the others as not stored."""
    min_probability: Share = 0.5
    """A fact's weakest target token must reach this."""
    min_probes_unchanged: Share = 0.95
    """Share of locality probes whose answer must not change."""
    min_generality: Share = 0.0
    """Share of phrasings that were not trained on which must be answered word for word; 0: measured only."""
    min_locality: Share = 0.0
    """Share of probes and of the questions nearest to the facts that must be answered as the base model answers them, where it was sure;
    0: measured only."""
    max_perplexity_increase: float = Field(default=0.1, gt=0, le=1000)
    """Of general text, over the base model's; 0.01 is 1 %."""
    corpus: str = Field(default="", max_length=1000)
    """A text file of the workspace on which that is measured; none: the guard's held-out anchors."""
    system_prompt: str = Field(default="You are a helpful assistant.", max_length=2000)
    """With which the facts are asked too; none: they are not."""
    measured_sample: Sample = "confident"
    """Facts that are asked in other words and forms, and whose neighbours are looked at."""
    served_sample: Sample = "confident"
    """Facts generated freely by the engine and compared word for word."""
    confidence: OpenShare = 0.99
    max_failing_share: OpenShare = 0.01
    """With `confidence`, the size of a "confident" sample: 459 facts at 0.99 and 0.01."""
    served: bool = True
    """Repeat the proof on the serving engine."""


class CompactionSection(_Section):
    """When writing all live facts afresh is proposed, and what it must show of the answers that are gone."""

    max_dead_probability: OpenShare = 0.1
    """A superseded or retracted answer must be less likely than this, as a whole, after a compaction."""
    dead_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Proposed when so many of the answers written since the last compaction are superseded or retracted."""
    harm_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Proposed when the latest release's harm has used this share of `guard.max_kl_nats`."""
    rank_limit: int = Field(default=0, ge=0, le=512)
    """Proposed when the memory has reached this rank; 0: `memory.max_rank`."""


class RetractionSection(_Section):
    """What the model says in the place of a retracted fact until a compaction."""

    answer: str = Field(default="I do not know.", min_length=1, max_length=500, pattern=r"\S")
    """A text, or `base`: what the base model itself answers."""


class ResourcesSection(_Section):
    """How training uses the machine. Nothing here but `quantization` changes what is learned."""

    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Of the base model while it is trained on, through bitsandbytes; the memory itself stays float32."""
    sharding: Literal["none", "fsdp"] = "none"
    """`fsdp`: under a launcher of several processes each keeps a share of the base model's layers, not all of them. For a base model that
    fits no single device; slower, as every layer is gathered each time that it runs."""
    checkpointing: Literal["auto", "always", "never"] = "auto"
    """Gradient checkpointing: activations are computed twice rather than kept. `auto`: where they would not fit."""
    cache_memory_mib: int = Field(default=512, ge=0, le=10_000_000)
    """Host memory for what the layers below the lowest adapted one give, MiB."""
    cache_file_mib: int = Field(default=0, ge=0, le=10_000_000)
    """Beyond that, in a temporary file in the workspace, MiB."""
    memory_share: Share = 0.95
    """Training that is estimated to need more than this share of the free memory is refused; 0: never."""


class ServingSection(_Section):
    """The engine that `memupdate serve` starts."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_loras: int = Field(default=4, ge=1, le=256)
    """Releases that one batch of requests may mix, at most; each slot costs memory at the full rank."""
    max_model_len: int = Field(default=0, ge=0, le=10_000_000)
    """Tokens; 0: the model's own."""
    kv_cache_gib: int = Field(default=1, ge=1, le=4096)
    """Memory for the key-value cache on the CPU, GiB."""
    drain_s: int = Field(default=5, ge=0, le=3600)
    """How long requests in flight may finish when an engine is stopped."""
    retire_after_s: int = Field(default=0, ge=0, le=10**9)
    """A release older than its alias's that no alias, canary or rollback names is answered with 404 from so long after the
    alias's last step on, at the next command that writes; 0: never. Its files stay, and `publish` revives it."""
    canary_max_error_share: Share = 0.01
    """A canary of whose requests more than this share ends with a server error, or is not found, is aborted."""
    canary_min_requests: int = Field(default=50, ge=1, le=10**9)
    """Requests that a canary must have answered before it is judged by them."""
    route: Literal["always", "matched"] = "always"
    """`matched`: requests that mention nothing a release knows go to the untouched base model. Holds from the next
    publishing on."""
    max_restarts: int = Field(default=5, ge=0, le=1000)
    """How often an engine that died is started again within `restart_window_s`; one more failure gives it up."""
    restart_window_s: float = Field(default=600.0, gt=0, le=86_400)
    hang_s: float = Field(default=60.0, ge=5, le=3600)
    """An engine that has not answered `/health` for so long is killed and started again."""
    extra_args: Annotated[tuple[str, ...], Field(strict=False, max_length=64)] = ()
    """Further engine arguments, one word each, as on its command line."""

    @field_validator("extra_args")
    @classmethod
    def _no_refused_flags(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if not word or "\x00" in word:
                raise ValueError("an argument is empty or holds a NUL; allowed: one word of the command line each")
            if _is_refused_flag(word):
                refused = ", ".join(_REFUSED_ENGINE_FLAGS)
                raise ValueError(f"{word} is not for a policy to set; allowed: flags other than {refused}")
        return words


class AccessKey(_Section):
    """What the holder of one API key may ask."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key, which itself is in no file; use long random keys, for what is short can be guessed from this."""
    collections: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=4096)]
    """Names of collections, or `"*"` alone for all."""
    base_model: bool = True
    """Whether the untouched base model may be asked by its name."""

    @field_validator("collections")
    @classmethod
    def _names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if names != ("*",) and COLLECTION_PATTERN.fullmatch(name) is None:
                raise ValueError(f'{name!r} is no collection; allowed: names of collections, or "*" alone')
        return names


class AccessSection(_Section):
    """Which API keys may ask which collections; without keys, everybody who reaches the engine may ask all."""

    keys: Annotated[tuple[AccessKey, ...], Field(strict=False, max_length=4096)] = ()
    """Tables of `sha256`, `collections` and `base_model`."""

    @field_validator("keys")
    @classmethod
    def _once_each(cls, keys: tuple[AccessKey, ...]) -> tuple[AccessKey, ...]:
        if len({key.sha256 for key in keys}) != len(keys):
            raise ValueError("a key comes twice; allowed: each sha256 once, with all its collections")
        return keys


def _is_refused_flag(word: str) -> bool:
    """The engine's parser takes `_` for `-`, `--flag=value`, `--flag.key=value` and the beginning of a flag."""
    flag = word.split("=", 1)[0].split(".", 1)[0].replace("_", "-")
    return len(flag) > 2 and flag.startswith("--") and any(known.startswith(flag) for known in _REFUSED_ENGINE_FLAGS)


class Policy(_Section):
    """One whole policy: see each section. Build it with `load_policy` or `parse_policy`."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = Field(default="", max_length=2000)
    facts: FactsSection = FactsSection()
    memory: MemorySection = MemorySection()
    training: TrainingSection = TrainingSection()
    guard: GuardSection = GuardSection()
    budget: BudgetSection = BudgetSection()
    escalation: EscalationSection = EscalationSection()
    proof: ProofSection = ProofSection()
    compaction: CompactionSection = CompactionSection()
    retraction: RetractionSection = RetractionSection()
    resources: ResourcesSection = ResourcesSection()
    serving: ServingSection = ServingSection()
    access: AccessSection = AccessSection()

    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> dict[str, Origin]:
        """Dotted key → where its value comes from; keys that are absent have their defaults."""
        return dict(self._origins)

    def values(self) -> dict[str, Any]:
        """All values, defaults included, as nested plain data."""
        return self.model_dump(mode="json")

    def resolved_json(self) -> str:
        """Every value and the origin of each that is not a default; equal policies give equal text.

        `parse_resolved_policy` reads it back, so that an interrupted batch resumes under the policy it began with.
        """
        return canonical_json({**self.values(), "origins": self.origins})
