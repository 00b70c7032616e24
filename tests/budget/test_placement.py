"""Placements against the modules that Transformers really builds, and against sizes written in papers."""

import pytest

from memupdate.budget.placement import PLACEMENTS, SUPPORTED_MODEL_TYPES, resolve_placement
from memupdate.errors import ModelError, PolicyError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_one_layer_at_sixty_percent_depth():
    shape = resolve_placement("mlp-one", LLAMA)
    assert shape.matrices == (
        ("model.layers.2.mlp.gate_proj", 256, 704),
        ("model.layers.2.mlp.up_proj", 256, 704),
        ("model.layers.2.mlp.down_proj", 704, 256),
    )
    # Platform trial: 2,880 parameters per rank.
    assert shape.parameters_per_rank == 2880


@pytest.mark.parametrize(("layers", "chosen"), [(1, 0), (4, 2), (5, 3), (15, 9), (32, 19), (36, 21)])
def test_depth_is_rounded_down(layers, chosen):
    shape = resolve_placement("mlp-one", {**LLAMA, "num_hidden_layers": layers})
    assert shape.matrices[0][0] == f"model.layers.{chosen}.mlp.gate_proj"


def test_the_last_layer():
    shape = resolve_placement("mlp-last", LLAMA)
    assert [name for name, _, _ in shape.matrices] == [
        f"model.layers.3.mlp.{part}_proj" for part in ("gate", "up", "down")
    ]


def test_all_layers_and_all_linear():
    assert resolve_placement("mlp-all", LLAMA).parameters_per_rank == 4 * 2880
    everything = resolve_placement("all-linear", LLAMA)
    assert len(everything.matrices) == 4 * 7
    sizes = {name.rsplit(".", 1)[1]: (d_in, d_out) for name, d_in, d_out in everything.matrices}
    assert sizes["q_proj"] == (256, 256)
    assert sizes["k_proj"] == sizes["v_proj"] == (256, 128)
    assert sizes["o_proj"] == (256, 256)


def test_a_head_size_of_its_own_counts():
    qwen3 = {**LLAMA, "model_type": "qwen3", "head_dim": 128}
    sizes = {
        name.rsplit(".", 1)[1]: (d_in, d_out) for name, d_in, d_out in resolve_placement("all-linear", qwen3).matrices
    }
    assert sizes["q_proj"] == (256, 512)
    assert sizes["k_proj"] == (256, 256)
    assert sizes["o_proj"] == (512, 256)


def test_missing_key_value_heads_and_a_null_head_size_follow_from_the_others():
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"} | {"head_dim": None}
    sizes = {name: (d_in, d_out) for name, d_in, d_out in resolve_placement("all-linear", config).matrices}
    assert sizes["model.layers.0.self_attn.k_proj"] == (256, 256)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_names_and_sizes_are_those_of_the_model(model_type, placement):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    head = {"head_dim": 24} if model_type in ("qwen3", "mistral") else {}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    config = transformers.AutoConfig.for_model(
        model_type, num_attention_heads=4, num_key_value_heads=2, **sizes, **head
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name}
    shape = resolve_placement(placement, config.to_dict())
    for name, d_in, d_out in shape.matrices:
        assert (linear[name].in_features, linear[name].out_features) == (d_in, d_out)
    if placement == "all-linear":
        assert {name for name, _, _ in shape.matrices} == set(linear)


def test_what_is_not_known_is_refused():
    with pytest.raises(ModelError) as caught:
        resolve_placement("mlp-all", {**LLAMA, "model_type": "mixtral"})
    assert "llama, mistral, qwen2, qwen3" in caught.value.hint
    with pytest.raises(PolicyError, match="mlp-some"):
        resolve_placement("mlp-some", LLAMA)
    with pytest.raises(ModelError, match="intermediate_size is None"):
        resolve_placement("mlp-all", {key: value for key, value in LLAMA.items() if key != "intermediate_size"})
