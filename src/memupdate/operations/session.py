"""What an operation needs of a workspace, each part made when first asked for: folder, policy, tokenizer, weights, anchors, probes.

Importing this loads no torch; asking for `base` does.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from memupdate.budget.placement import AUTO, PLACEMENTS, resolve_placement
from memupdate.budget.plan import PlacementShape
from memupdate.errors import ModelError
from memupdate.facts.model import Fact, normalise, prompt_key
from memupdate.facts.reader import read_facts
from memupdate.facts.render import Example, Renderer, answer_text, resolve_style
from memupdate.facts.secrets import SecretPatterns
from memupdate.facts.stream import FactStream
from memupdate.law.density import token_classes
from memupdate.layout import WorkspaceLayout
from memupdate.models.folder import ModelFolder, resolve_model
from memupdate.operations.config import WorkspaceConfig, load_config
from memupdate.policies import Policy, load_policy
from memupdate.progress import Progress
from memupdate.storage import canonical_json, text_sha256

if TYPE_CHECKING:
    from memupdate.models.base import BaseModel
    from memupdate.training.anchors import Anchors
    from memupdate.training.loop import TrainingSettings

_TRAINER_VERSION = 2
"""Raised when the trainer changes so that points measured before no longer predict."""

_RECIPE_PARTS = {
    "facts": ("rendering", "chat_template_kwargs", "train_paraphrases"),
    "memory": ("train_basis", "scale"),
}
"""Of these sections only some values change what is measured."""


@dataclass(frozen=True)
class Guard:
    """Anchors to train against and those kept for measuring; None without a guard."""

    train: Anchors | None
    holdout: Anchors | None


_Part = TypeVar("_Part")


class _shared_property(Generic[_Part]):
    """A `cached_property` of all placements of a session together: whichever asks first makes it for all."""

    def __init__(self, make: Callable[[Session], _Part]) -> None:
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, session: Session, owner: type | None = None) -> _Part:
        if self.name not in session.parts:
            session.parts[self.name] = self.make(session)
        part: _Part = session.parts[self.name]
        return part


@dataclass
class Session:
    """One workspace under one policy, and, where something is planned or written, under one placement."""

    root: Path
    config: WorkspaceConfig
    policy: Policy
    base_losses: dict[tuple[str, ...], float] = field(default_factory=dict)
    """Measured base loss of sets of facts, by their ids."""
    parts: dict[str, Any] = field(default_factory=dict, repr=False)
    """What was made already and does not depend on the placement, by name."""
    placement: str = ""
    """Chosen with `with_placement`; empty for the policy's."""

    @classmethod
    def open(cls, root: Path, overrides: Mapping[str, Any] | None = None) -> Session:
        """Read configuration and policy, some of whose values `overrides` replaces. Raises UsageError, PolicyError."""
        config = load_config(root)
        local = root / config.policy
        return cls(root, config, load_policy(str(local) if local.is_file() else config.policy, overrides))

    @property
    def layout(self) -> WorkspaceLayout:
        """Where everything is."""
        return WorkspaceLayout(self.root)

    @property
    def api_key(self) -> str | None:
        """What clients of the engine must show, from the environment; never written down."""
        return os.environ.get("VLLM_API_KEY") or None

    @_shared_property
    def folder(self) -> ModelFolder:
        """The base model's folder. Raises ModelError."""
        model = self.config.model
        local = self.root / model
        return resolve_model(str(local) if local.is_dir() else model)

    @_shared_property
    def fingerprint(self) -> str:
        """Identity of the base model."""
        return self.folder.fingerprint(self.layout.cache)

    @cached_property
    def shape(self) -> PlacementShape:
        """The placement on this model. Raises PolicyError where the policy's is `auto` and none was chosen."""
        return resolve_placement(self.placement or self.policy.memory.placement, self.folder.config)

    def with_placement(self, name: str) -> Session:
        """This session under placement `name`; model, tokenizer, anchors and all else are the same objects, loaded once."""
        placed = copy.copy(self)
        placed.__dict__.pop("shape", None)
        placed.placement = name
        return placed

    def placements(self) -> tuple[Session, ...]:
        """This session under each placement that the policy lets an empty memory have, the policy's first choice first."""
        wanted = self.policy.memory.placement
        return tuple(self.with_placement(name) for name in (PLACEMENTS if wanted == AUTO else (wanted,)))

    @_shared_property
    def recipe(self) -> str:
        """Identity of all that measured points depend on besides model, placement, rank and facts."""
        values = self.policy.values()
        parts: dict[str, Any] = {name: values[name] for name in ("training", "guard")}
        parts |= {section: {name: values[section][name] for name in names} for section, names in _RECIPE_PARTS.items()}
        parts["trainer"] = _TRAINER_VERSION
        if self.policy.resources.quantization != "none":  # another base model, in effect
            parts["quantization"] = self.policy.resources.quantization
        return text_sha256(canonical_json(parts))

    def count_target_tokens(self, facts: list[Fact]) -> int:
        """Target tokens of `facts`, end tokens included; torch-free."""
        rendering, has_template = self.policy.facts.rendering, self.folder.has_chat_template
        total = 0
        for fact in facts:
            style = resolve_style(fact.rendering, rendering, has_chat_template=has_template)
            total += self.folder.count_tokens(answer_text(fact, style)) + 1
        return total

    def count_targets(self, facts: Iterable[Fact]) -> Counter[str]:
        """Target tokens of `facts` by class (`law.density`), end tokens included; torch-free."""
        return Counter(chain.from_iterable(map(token_classes, self.target_token_texts(facts))))

    def target_token_texts(self, facts: Iterable[Fact]) -> Iterator[tuple[str, ...]]:
        """The target tokens of each fact as texts, "" for the end token; torch-free."""
        rendering, has_template = self.policy.facts.rendering, self.folder.has_chat_template
        styled = ((fact, resolve_style(fact.rendering, rendering, has_chat_template=has_template)) for fact in facts)
        for texts in self.folder.token_texts(answer_text(fact, style) for fact, style in styled):
            yield (*texts, "")

    @_shared_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, with its chat template; loads no weights."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder.path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(
                f"{self.folder.path}: no tokenizer can be loaded ({first_line})", "download the model again"
            ) from error

    @_shared_property
    def renderer(self) -> Renderer:
        """Facts to token ids under this policy."""
        section = self.policy.facts
        context = int(self.folder.config.get("max_position_embeddings", 0))
        return Renderer(
            self.tokenizer, rendering=section.rendering, template_kwargs=section.chat_template_kwargs, context=context
        )

    @_shared_property
    def base(self) -> BaseModel:
        """The base model's weights, in memory."""
        from memupdate.models.base import load_base

        section = self.policy.resources
        return load_base(
            self.folder, dtype=self.policy.training.dtype, quantization=section.quantization, sharding=section.sharding
        )

    def guard(self, progress: Progress) -> Guard:
        """Anchors, sampled from the base model the first time and cached."""
        from memupdate.training.anchors import load_or_sample

        section = self.policy.guard
        if not section.enabled:
            return Guard(None, None)
        beginning = [
            self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        ]
        user = self.renderer.user_prefix_ids()
        # A chat model is asked mostly by chat: three anchors in four begin where a user's words begin.
        prefixes = [beginning] if user is None else [beginning, list(user), list(user), list(user)]
        count, tokens, seed = section.anchors + section.holdout, section.anchor_tokens, self.policy.training.seed
        identity: list[Any] = [self.fingerprint, prefixes, count, tokens, seed, self.policy.training.dtype]
        if self.policy.resources.quantization != "none":
            identity.append(self.policy.resources.quantization)
        folder = self.layout.cache / f"anchors-{text_sha256(canonical_json(identity))[7:23]}"
        anchors = load_or_sample(folder, self.base, prefixes, count=count, tokens=tokens, seed=seed, progress=progress)
        return Guard(anchors.select(slice(0, section.anchors)), anchors.select(slice(section.anchors, count)))

    def training_settings(self, *, max_epochs: int | None = None) -> TrainingSettings:
        """The policy as the values that the loop takes."""
        from memupdate.training.loop import TrainingSettings

        training, guard = self.policy.training, self.policy.guard
        return TrainingSettings(
            objective=training.objective, goal=training.threshold + training.margin, threshold=training.threshold,
            learning_rate=training.learning_rate, batch_size=training.batch_size, max_epochs=max_epochs or training.max_epochs,
            recheck_every=training.recheck_every, clip_norm=training.clip_norm, seed=training.seed,
            train_basis=self.policy.memory.train_basis, guard_weight=guard.weight if guard.enabled else 0.0,
            anchors_per_step=guard.anchors_per_step, max_kl_nats=guard.max_kl_nats,
        )  # fmt: skip

    def basis_seed(self, collection: str) -> str:
        """What the collection's frozen basis `A` is drawn from; the same for every batch and every growth."""
        return f"{self.policy.training.seed}:{collection}"

    def training_examples(self, facts: list[Fact], *, whole: Collection[str] = ()) -> list[Example]:
        """Each fact under its own prompt, then under the phrasings that are trained on.

        Args:
            whole: ids of facts that are trained on under all their phrasings.
        """
        examples = self.renderer.render_all(facts)
        for fact in facts:
            trained, held_out = self.phrasings(fact)
            prompts = (*trained, *held_out) if fact.id in whole else trained
            examples += [self.renderer.render(fact, prompt) for prompt in prompts]
        return examples

    def fact_stream(
        self, path: Path | str, *, columns: Mapping[str, str] | None = None, format: str | None = None
    ) -> FactStream:
        """A facts file, without what the policy refuses as secrets. Raises FactsError for an unknown format or field."""
        refused = SecretPatterns.named(self.policy.facts.refuse)
        return FactStream(path, columns=columns, format=format, secrets=refused)

    def phrasings(self, fact: Fact) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A fact's wordings besides its prompt: those that are trained on, and those kept apart to measure generality.

        Of its paraphrases, and of the policy's templates for its relation, the policy's share is trained on, the first ones.
        """
        trained: list[str] = []
        held_out: list[str] = []
        for wordings in (fact.paraphrases, self._templates_of(fact)):
            count = round(len(wordings) * self.policy.facts.train_paraphrases)
            trained += wordings[:count]
            held_out += wordings[count:]
        return tuple(trained), tuple(wording for wording in held_out if wording not in trained)

    def wordings(self, fact: Fact) -> tuple[str, ...]:
        """All questions that a fact answers, its prompt first."""
        return tuple(dict.fromkeys((fact.prompt, *fact.paraphrases, *self._templates_of(fact))))

    def _templates_of(self, fact: Fact) -> tuple[str, ...]:
        if not fact.subject or not fact.relation or fact.context or not self.policy.facts.templates:
            return ()
        by_relation = {normalise(relation): texts for relation, texts in self.policy.facts.templates.items()}
        wordings = (text.replace("{subject}", fact.subject) for text in by_relation.get(normalise(fact.relation), ()))
        return tuple(wording for wording in wordings if wording not in (fact.prompt, *fact.paraphrases))

    def probe_facts(self, live: list[Fact]) -> list[Fact]:
        """Probes of the workspace and of the live facts, without those that a live fact means to change."""
        changed = {fact.key for fact in live} | {prompt_key(p) for fact in live for p in self.wordings(fact)}
        given = [Fact(prompt=p.prompt, target=p.target or "?") for fact in live for p in fact.locality]
        return [p for p in self.workspace_probes + given if not changed & {p.key, prompt_key(p.prompt)}]

    @_shared_property
    def workspace_probes(self) -> list[Fact]:
        """The facts of the probes file. Raises FactsError."""
        if not self.config.probes:
            return []
        return [located.fact for located in read_facts(self.root / self.config.probes).facts]
