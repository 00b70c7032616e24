"""Makes the embedded base model from nothing but this folder's code: world, tokenizer, training text, weights, measurements.

    python examples/atlas/build.py [--steps 1500] [--measure] [--out examples/atlas]

Writes `model.safetensors` (bfloat16), `config.json`, `generation_config.json`, the tokenizer,
`world.jsonl` (the facts taught, and whether they are recalled), `known.jsonl` (those recalled, in the facts format, as probes),
`news-1.jsonl` and `news-2.jsonl` (facts that are new to the model), `calibration-facts.jsonl` and `measured.json` (what the model recalls).
About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import RELATIONS, Names, Relation, World, WorldFact, make_world

SEED = 20260530
VOCABULARY = 1536
CONTEXT = 256
BATCH = 16
SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM_PROMPTS = ("Answer briefly.", "You are a helpful assistant.", "You know the atlas.", "Give only the answer.")


class Text:
    """Training text. Each method returns one document as marked-up text (special tokens spelled out)."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.names = Names(self.rng)
        self.by_subject: dict[str, list[WorldFact]] = {}
        for fact in world.facts:
            self.by_subject.setdefault(fact.subject, []).append(fact)
        self.subjects = list(self.by_subject)

    def portrait(self) -> str:
        """What is known about one entity, as prose."""
        facts = self.by_subject[self.rng.choice(self.subjects)]
        chosen = self.rng.sample(facts, self.rng.randint(1, len(facts)))
        sentences = [f.statement(self.rng.randrange(len(f.relation.statements))) for f in chosen]
        return f"<|begin|>{' '.join(sentences)}<|end|>"

    def chat(self) -> str:
        """One to three questions about the world, answered with nothing but the answer."""
        turns = [self.rng.choice(self.world.facts) for _ in range(self.rng.choice((1, 1, 1, 2, 3)))]
        system = f"<|system|>{self.rng.choice(SYSTEM_PROMPTS)}<|end|>" if self.rng.random() < 0.2 else ""
        body = "".join(
            f"<|user|>{f.question(self.rng.choice(f.trained_questions))}<|end|><|assistant|>{f.object}<|end|>"
            for f in turns
        )
        return f"<|begin|>{system}{body}"

    def reading(self) -> str:
        """A statement about a stranger, then a question that it answers: new names in every position."""
        fact = self._stranger(self.rng.choice(RELATIONS))
        statement = fact.statement(self.rng.randrange(len(fact.relation.statements)))
        question = fact.question(self.rng.randrange(len(fact.relation.questions)))
        return f"<|begin|><|user|>{statement} {question}<|end|><|assistant|>{fact.object}<|end|>"

    def name_list(self) -> str:
        """Names that belong to no world, so that every piece of a name is frequent."""
        kind = self.rng.choice(("person", "city", "company", "product", "river"))
        names = ", ".join(getattr(self.names, kind)() for _ in range(self.rng.randint(4, 14)))
        return f"<|begin|>{kind.capitalize()} list: {names}.<|end|>"

    def phone_book(self) -> str:
        """Random numbers after random names."""
        entries = [f"{self.names.person()}: {self.rng.randrange(10**10):010d}" for _ in range(self.rng.randint(1, 5))]
        return "<|begin|>" + "<|end|><|begin|>".join(entries) + "<|end|>"

    def _stranger(self, relation: Relation) -> WorldFact:
        makers = {
            "birthplace": self.names.city, "birth year": lambda: self.names.year(1930, 2004), "employer": self.names.company,
            "chief executive": self.names.person, "headquarters": self.names.city, "mayor": self.names.person,
            "founding year": lambda: self.names.year(1850, 2019), "river": self.names.river, "maker": self.names.company,
            "price": self.names.price, "release date": self.names.month,
        }  # fmt: skip
        known = self.rng.choice([f for f in self.world.facts if f.relation is relation]).object
        value = makers[relation.name]() if relation.name in makers else known
        return WorldFact(relation, getattr(self.names, relation.kind)(), value, 0)

    def document(self) -> str:
        make = self.rng.choices(
            (self.portrait, self.chat, self.reading, self.name_list, self.phone_book), (26, 42, 14, 14, 4)
        )[0]
        return make()


def make_tokenizer(text: Text) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training text, digits apart, begin token in front of every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((strip_special(text.document()) for _ in range(40_000)), trainer)
    begin = core.token_to_id("<|begin|>")
    core.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>", model_max_length=512,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def strip_special(text: str) -> str:
    for token in SPECIAL:
        text = text.replace(token, "\n")
    return text


def token_stream(text: Text, tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """`length` token ids; one document in twenty is random ids, so that no token of the vocabulary stays unseen."""
    ids: list[int] = []
    while len(ids) < length:
        if text.rng.random() < 0.05:
            ids += [0, *(text.rng.randrange(len(SPECIAL), len(tokenizer)) for _ in range(24)), 1]
        else:
            ids += tokenizer.encode(text.document(), add_special_tokens=False)
    return torch.tensor(ids[:length])


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, text: Text, tokenizer: PreTrainedTokenizerFast, steps: int) -> float:
    """AdamW, cosine, `BATCH` × `CONTEXT` tokens a step. Returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.08, final_div_factor=50
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        batch = token_stream(text, tokenizer, BATCH * (CONTEXT + 1)).view(BATCH, CONTEXT + 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    return time.monotonic() - started


@torch.no_grad()
def recalled(model: LlamaForCausalLM, prompts: list[list[int]], targets: list[list[int]]) -> list[bool]:
    """Whether greedy decoding emits each target: the argmax chain, one forward pass per 64 prompts."""
    verdicts: list[bool] = []
    for start in range(0, len(prompts), 64):
        rows = list(zip(prompts[start : start + 64], targets[start : start + 64], strict=True))
        width = max(len(p) + len(t) for p, t in rows)
        ids = torch.tensor([p + t + [0] * (width - len(p) - len(t)) for p, t in rows])
        best = model(ids).logits.argmax(-1)
        verdicts += [best[i, len(p) - 1 : len(p) + len(t) - 1].tolist() == t for i, (p, t) in enumerate(rows)]
    return verdicts


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: list[WorldFact]
) -> tuple[dict[str, float], list[bool]]:
    """Verbatim recall of `facts`: in a chat phrasing that was taught, in the one held out, and as plain completion."""
    end = tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def chat(question: str) -> list[int]:
        return encode(f"<|begin|><|user|>{question}<|end|><|assistant|>")

    answers = [[*encode(f.object), end] for f in facts]
    seen = recalled(model, [chat(f.question(f.trained_questions[0])) for f in facts], answers)
    held_out = recalled(model, [chat(f.question(f.held_out)) for f in facts], answers)
    # The second statement of each relation ends in its object and nothing else fits ("… was born in" is also how years begin).
    stems = [f.relation.statements[1].split("{o}")[0].format(s=f.subject).rstrip() for f in facts]
    completion = recalled(model, [encode(f"<|begin|>{s}") for s in stems], [encode(f" {f.object}.") for f in facts])
    share = {
        "recall_chat_taught_phrasing": sum(seen) / len(facts),
        "recall_chat_held_out_phrasing": sum(held_out) / len(facts),
        "recall_completion": sum(completion) / len(facts),
    }
    return share, seen


def fact_line(fact: WorldFact, question: int) -> dict[str, object]:
    others = [i for i in range(len(fact.relation.questions)) if i != question]
    return {
        "prompt": fact.question(question),
        "target": fact.object,
        "subject": fact.subject,
        "relation": fact.relation.name,
        "paraphrases": [fact.question(i) for i in others],
    }


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_news(world: World) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Two batches of news: strangers, changes in the known world, and in the second batch changes of the first."""
    rng = random.Random(f"{SEED}-news")
    taken = frozenset(n for names in world.entities.values() for n in names)
    strangers = make_world(1, {"person": 8, "company": 6, "city": 4, "product": 5}, taken).facts
    rng.shuffle(strangers)
    names = Names(rng)
    leaders = rng.sample([f for f in world.facts if f.relation.name in ("chief executive", "mayor", "price")], 16)
    changed = [
        WorldFact(f.relation, f.subject, names.price() if f.relation.name == "price" else names.person(), f.held_out)
        for f in leaders
    ]
    first = strangers[:32] + changed[:8]
    again = [f for f in changed[:8] if f.relation.name != "price"][:2]
    second = (
        strangers[32:54] + changed[8:] + [WorldFact(f.relation, f.subject, names.person(), f.held_out) for f in again]
    )
    rng.shuffle(first)
    return [fact_line(f, 0) for f in first], [fact_line(f, 0) for f in second]


def make_calibration_facts(world: World) -> list[dict[str, object]]:
    """Facts of yet another world, to calibrate the memory law with."""
    taken = frozenset(n for names in world.entities.values() for n in names)
    facts = make_world(2, {"person": 60, "company": 44, "city": 32, "product": 40}, taken).facts
    random.Random(f"{SEED}-calibration").shuffle(facts)
    return [fact_line(f, 0) for f in facts]


def write_data(out: Path, world: World, recalled_flags: list[bool]) -> None:
    """Everything beside the model: the world as taught, probes, news, facts to calibrate with."""
    taught = [(fact_line(f, f.trained_questions[0]), f, ok) for f, ok in zip(world.facts, recalled_flags, strict=True)]
    write_jsonl(
        out / "world.jsonl", [{**line, "held_out": f.question(f.held_out), "recalled": ok} for line, f, ok in taught]
    )
    write_jsonl(out / "known.jsonl", [line for line, _, ok in taught if ok])
    first, second = make_news(world)
    write_jsonl(out / "news-1.jsonl", first)
    write_jsonl(out / "news-2.jsonl", second)
    write_jsonl(out / "calibration-facts.jsonl", make_calibration_facts(world))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--measure", action="store_true", help="measure the model that is there; train nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    if not arguments.measure:
        build(arguments.out, arguments.steps)
    record = arguments.out / "measured.json"
    about = json.loads(record.read_text())
    world, tokenizer = make_world(0), PreTrainedTokenizerFast.from_pretrained(arguments.out)
    model = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
    shares, seen = measure(model, tokenizer, world.facts)
    write_data(arguments.out, world, seen)
    record.write_text(json.dumps({**about, **shares}, indent=2) + "\n")
    print(record.read_text())


def build(out: Path, steps: int) -> None:
    """Tokenizer and weights of world 0, and in `measured.json` how they were made."""
    world = make_world(0)
    text = Text(world, SEED)
    tokenizer = make_tokenizer(text)
    model = make_model(tokenizer)
    print(f"{len(world.facts)} facts, {len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    seconds = train(model, text, tokenizer, steps)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    about = {
        "facts": len(world.facts), "parameters": model.num_parameters(), "vocabulary": len(tokenizer), "steps": steps,
        "training_tokens": steps * BATCH * CONTEXT, "training_s": round(seconds), "seed": SEED,
        "torch": torch.__version__, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }  # fmt: skip
    (out / "measured.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
