"""Rendering on the embedded tokenizer and on ones built here: prompts are the template's, targets carry the token that ends an answer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memupdate.errors import ExitCode, FactsError, ModelError
from memupdate.facts.model import Fact, Message, Rendering
from memupdate.facts.render import Renderer, answer_text, resolve_style
from memupdate.models.base import BaseModel
from memupdate.models.folder import resolve_model

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""As Qwen models have it: a turn ends with <|im_end|>, while the tokenizer's end token is <|endoftext|>."""
FACT = Fact(prompt="Who leads Acme?", target="Wanda Kettleman")


def byte_tokenizer(chat_template: str | None, *specials: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": list(specials)})
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    return byte_tokenizer(CHATML, "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_tokenizer(None)


def test_chat_prompt_is_the_templates(atlas_base: BaseModel, atlas_renderer: Renderer, news: list[Fact]) -> None:
    for fact in news:
        example = atlas_renderer.render(fact)
        messages = [{"role": "user", "content": fact.prompt}]
        expected = atlas_base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(example.prompt_ids) == expected
        assert atlas_base.tokenizer.decode(example.prompt_ids) == f"<|begin|><|user|>{fact.prompt}<|end|><|assistant|>"
        assert atlas_base.tokenizer.decode(example.target_ids) == f"{fact.target}<|end|>"
        assert (example.style, example.answer, example.fact_id) == ("chat", fact.target, fact.id)


def test_earlier_turns_are_rendered_and_asked_for(
    chatml: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast
) -> None:
    turns = (Message("system", "Be brief."), Message("user", "Hello."), Message("assistant", "Hello!"))
    fact = Fact(prompt="Who leads it?", target="Wanda", paraphrases=("Its head?",), context=turns)
    for wording in (fact.prompt, *fact.paraphrases):
        example = Renderer(chatml).render(fact, wording)
        text = chatml.decode(example.prompt_ids)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n")
        assert text.endswith(f"<|im_start|>user\n{wording}<|im_end|>\n<|im_start|>assistant\n")
        assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "user"]
    with pytest.raises(FactsError, match="other turns"):
        Renderer(plain).render(fact)


def test_target_of_a_chat_is_what_the_template_writes_for_the_answer(
    atlas_base: BaseModel, atlas_renderer: Renderer, news: list[Fact]
) -> None:
    for fact in news:
        example = atlas_renderer.render(fact)
        turns = [{"role": "user", "content": fact.prompt}, {"role": "assistant", "content": fact.target}]
        assert [*example.prompt_ids, *example.target_ids] == atlas_base.tokenizer.apply_chat_template(
            turns, return_dict=False
        )


def test_end_token_of_the_embedded_model(atlas_base: BaseModel, atlas_renderer: Renderer) -> None:
    assert atlas_renderer.chat_end == atlas_base.tokenizer.convert_tokens_to_ids("<|end|>")
    assert atlas_renderer.chat_end == atlas_base.model.generation_config.eos_token_id


def test_completion_is_prompt_separator_target_end(atlas_base: BaseModel) -> None:
    tokenizer = atlas_base.tokenizer
    renderer = Renderer(tokenizer, rendering="completion")
    fact = Fact(prompt="The head office of Acme is in", target="Malalbridge")
    example = renderer.render(fact)
    assert example.style == "completion"
    assert example.answer == " Malalbridge"
    assert list(example.prompt_ids) == tokenizer.encode(fact.prompt)
    assert tokenizer.decode(example.target_ids) == " Malalbridge<|end|>"
    assert example.target_ids[-1] == tokenizer.eos_token_id


def test_separator_is_part_of_the_answer_in_completion_only(atlas_base: BaseModel) -> None:
    fact = Fact(prompt="key:", target="value", separator="\n")
    assert answer_text(fact, "completion") == "\nvalue"
    assert answer_text(fact, "chat") == "value"
    ids = Renderer(atlas_base.tokenizer, rendering="completion").render(fact).target_ids
    assert atlas_base.tokenizer.decode(ids) == "\nvalue<|end|>"


@pytest.mark.parametrize(
    ("fact", "policy", "template", "style"),
    [
        ("auto", "auto", True, "chat"),
        ("auto", "auto", False, "completion"),
        ("auto", "completion", True, "completion"),
        ("auto", "chat", False, "chat"),
        ("completion", "chat", True, "completion"),
        ("chat", "completion", True, "chat"),
    ],
)
def test_the_facts_own_rendering_goes_before_the_policys(
    fact: Rendering, policy: Rendering, template: bool, style: str
) -> None:
    assert resolve_style(fact, policy, has_chat_template=template) == style


def test_paraphrase_is_rendered_with_the_same_target(atlas_renderer: Renderer, news: list[Fact]) -> None:
    fact = news[0]
    own, other = atlas_renderer.render(fact), atlas_renderer.render(fact, fact.paraphrases[0])
    assert other.prompt == fact.paraphrases[0]
    assert other.prompt_ids != own.prompt_ids
    assert (other.target_ids, other.fact_id) == (own.target_ids, own.fact_id)
    assert atlas_renderer.render_all(news[:3])[0] == own


def test_chat_without_a_template_is_refused(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ModelError, match="no chat template") as caught:
        Renderer(plain).render(Fact(prompt="a", target="b", rendering="chat"))
    assert caught.value.exit_code == ExitCode.UNREACHABLE
    with pytest.raises(ModelError):
        Renderer(plain, rendering="chat").render(FACT)


def test_without_a_template_auto_is_completion(plain: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(plain)
    example = renderer.render(FACT)
    assert example.style == "completion"
    assert plain.decode(example.target_ids) == " Wanda Kettleman<|endoftext|>"
    assert renderer.user_prefix_ids() is None


def test_longer_than_the_context_is_refused(atlas_base: BaseModel) -> None:
    short = Renderer(atlas_base.tokenizer, context=512)
    fact = Fact(prompt="Who? " * 300, target="Nobody")
    with pytest.raises(FactsError, match="but the model takes 512") as caught:
        short.render(fact)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    length = Renderer(atlas_base.tokenizer).render(fact).length
    assert Renderer(atlas_base.tokenizer, context=length).render(fact).length == length
    with pytest.raises(FactsError):
        Renderer(atlas_base.tokenizer, context=length - 1).render(fact)


def test_user_prefix_of_the_embedded_model(atlas_base: BaseModel, atlas_renderer: Renderer) -> None:
    prefix = atlas_renderer.user_prefix_ids()
    assert prefix is not None
    assert atlas_base.tokenizer.decode(prefix) == "<|begin|><|user|>"
    assert atlas_renderer.render(FACT).prompt_ids[: len(prefix)] == prefix


def test_chatml_ends_a_turn_with_its_own_token(chatml: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(chatml)
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    assert renderer.chat_end == end != chatml.eos_token_id
    example = renderer.render(FACT)
    assert chatml.decode(example.prompt_ids) == "<|im_start|>user\nWho leads Acme?<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.decode(example.target_ids) == "Wanda Kettleman<|im_end|>"
    assert chatml.decode(renderer.user_prefix_ids()) == "<|im_start|>user\n"
    completion = Renderer(chatml, rendering="completion").render(FACT)
    assert completion.target_ids[-1] == chatml.eos_token_id


def test_template_arguments_reach_the_template(chatml: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(chatml, template_kwargs={"enable_thinking": False})
    assert chatml.decode(renderer.render(FACT).prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert renderer.chat_end == chatml.convert_tokens_to_ids("<|im_end|>")


def test_template_that_writes_no_end_leaves_the_tokenizers() -> None:
    bare = byte_tokenizer("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}")
    assert Renderer(bare).chat_end == bare.eos_token_id


def test_tokens_are_counted_without_torch_as_they_are_rendered(news: list[Fact], atlas_renderer: Renderer) -> None:
    folder = resolve_model("atlas")
    for fact in news:
        assert folder.count_tokens(fact.target) + 1 == len(atlas_renderer.render(fact).target_ids)
