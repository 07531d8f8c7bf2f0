"""Presets against published numbers; params.json and config.json of every family; what is refused, and how it is said."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest

from llama_jax.config import PRESETS, ModelConfig, mlp_dim_rule
from llama_jax.config_files import from_huggingface, from_meta
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import param_shapes

TINY = PRESETS["tiny"]

# arXiv:2302.13971, 2307.09288, 2308.12950, 2407.21783 and the model cards give these rounded; the integers are the sizes of the
# released files.
PUBLISHED = {
    "llama1_7b": 6_738_415_616,
    "llama1_13b": 13_015_864_320,
    "llama1_33b": 32_528_943_616,
    "llama1_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_34b": 33_743_970_304,
    "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688,
    "codellama_7b_python": 6_738_415_616,
    "codellama_13b": 13_016_028_160,
    "codellama_13b_python": 13_015_864_320,
    "codellama_34b": 33_743_970_304,
    "codellama_70b": 68_976_910_336,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_3_70b": 70_553_706_496,
    "tinyllama_1b": 1_100_048_384,
    "stories15m": 15_191_712,
    "stories110m": 109_529_856,
}


def refused(code: ExitCode, match: str):
    """pytest.raises of a LlamaError whose code is checked too."""
    return pytest.raises(LlamaError, match=match, check=lambda error: error.code is code)


# Presets and ModelConfig.


def test_every_preset_is_published_but_the_tiny_one():
    assert set(PRESETS) == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    assert PRESETS[name].num_params == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_the_tree_of_parameters_is_as_large_as_the_config_says(name):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(PRESETS[name]))) == PRESETS[name].num_params


@pytest.mark.parametrize("name, untied", [("llama3_2_1b", 1_498_482_688), ("llama3_2_3b", 3_606_752_256)])
def test_a_tied_head_is_counted_once(name, untied):
    assert dataclasses.replace(PRESETS[name], tied_head=False).num_params == untied


def test_tiny_tells_its_axes_apart():
    sizes = [TINY.num_heads, TINY.num_kv_heads, TINY.head_dim, TINY.embed_dim, TINY.mlp_dim, TINY.num_layers, TINY.vocab_size]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_a_flat_dict(name):
    flat = dataclasses.asdict(PRESETS[name])
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())
    assert ModelConfig(**flat) == PRESETS[name]
    assert hash(ModelConfig(**flat)) == hash(PRESETS[name])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(vocab_size=0), "vocab_size is 0, expected a positive number"),
        (dict(embed_dim=-1), "embed_dim is -1, expected a positive number"),
        (dict(num_layers=0), "num_layers is 0"),
        (dict(num_kv_heads=0), "num_kv_heads is 0"),
        (dict(max_length=0), "max_length is 0"),
        (dict(mlp_dim=80.0), r"mlp_dim is 80\.0, expected int"),
        (dict(num_heads="6"), "num_heads is '6', expected int"),
        (dict(num_heads=True), "num_heads is True, expected int"),
        (dict(norm_eps=None), "norm_eps is None, expected float"),
        (dict(tied_head=1), "tied_head is 1, expected bool"),
        (dict(norm_eps=0.0), r"norm_eps is 0\.0, expected a positive number"),
        (dict(norm_eps=math.nan), "norm_eps is nan"),
        (dict(rope_theta=math.inf), "rope_theta is inf"),
        (dict(rope_factor=-2.0), r"rope_factor is -2\.0"),
        (dict(num_kv_heads=4), "6 query heads cannot share 4 key/value heads"),
        (dict(head_dim=9), "head_dim is 9; rotary embedding needs an even number"),
        (dict(rope_type="longrope"), "rope_type 'longrope' is unknown; known: default, linear, dynamic, yarn, llama3"),
        (dict(rope_type="llama3"), "rope_type 'llama3' needs rope_original_length"),
        (dict(rope_type="yarn"), "needs rope_original_length"),
        (dict(rope_type="dynamic"), "needs rope_original_length"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(change, message):
    with refused(ExitCode.BAD_CONFIG, message):
        dataclasses.replace(TINY, **change)


def test_whole_numbers_are_floats_where_a_float_is_expected():
    assert dataclasses.replace(TINY, rope_theta=10000) == TINY


def test_reading_a_config_imports_no_jax():
    code = "import sys, llama_jax.config; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "embed_dim, multiplier, multiple_of, width",
    [
        (4096, None, 256, 11008),
        (4096, 1.0, 256, 11008),
        (5120, None, 256, 13824),
        (6656, None, 256, 17920),
        (8192, None, 256, 22016),
        (8192, 1.0, 256, 22016),
        (8192, 1.3, 4096, 28672),
        (8192, 1.3, 1024, 28672),
        (8192, 1.3, 256, 28416),  # not what Llama 2 70B has: multiple_of decides
        (4096, 1.3, 1024, 14336),
        (16384, 1.2, 4096, 53248),
        (2048, 1.5, 256, 8192),
        (3072, 1.0, 256, 8192),
    ],
)
def test_the_feed_forward_width_is_metas(embed_dim, multiplier, multiple_of, width):
    assert mlp_dim_rule(embed_dim, multiple_of, multiplier) == width


# Meta's params.json.


def meta_7b(**change: Any) -> dict[str, Any]:
    return dict(dim=4096, multiple_of=256, n_heads=32, n_layers=32, norm_eps=1e-5, vocab_size=-1) | change


def meta_13b(**change: Any) -> dict[str, Any]:
    return meta_7b(dim=5120, n_heads=40, n_layers=40) | change


def meta_70b(**change: Any) -> dict[str, Any]:
    return meta_7b(dim=8192, n_heads=64, n_layers=80, n_kv_heads=8, ffn_dim_multiplier=1.3, multiple_of=4096) | change


def meta_code(dim: int, n_layers: int, n_heads: int, **more: Any) -> dict[str, Any]:
    sizes = dict(dim=dim, n_layers=n_layers, n_heads=n_heads, multiple_of=256, ffn_dim_multiplier=1.0)
    return sizes | dict(norm_eps=1e-5, rope_theta=1000000) | more


def meta_3(dim: int, n_layers: int, n_heads: int, multiplier: float, multiple_of: int, **more: Any) -> dict[str, Any]:
    sizes = dict(dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=8, vocab_size=128256)
    rest = dict(ffn_dim_multiplier=multiplier, multiple_of=multiple_of, norm_eps=1e-5, rope_theta=500000.0)
    return sizes | rest | more


META = {  # preset: (params.json, rows of the embedding)
    "llama1_7b": (meta_7b(norm_eps=1e-6), 32000),
    "llama1_13b": (meta_13b(norm_eps=1e-6), 32000),
    "llama1_33b": (meta_7b(dim=6656, n_heads=52, n_layers=60, norm_eps=1e-6), 32000),
    "llama1_65b": (meta_7b(dim=8192, n_heads=64, n_layers=80), 32000),
    "llama2_7b": (meta_7b(), 32000),
    "llama2_13b": (meta_13b(), 32000),
    "llama2_70b": (meta_70b(), 32000),
    "codellama_7b": (meta_code(4096, 32, 32), 32016),
    "codellama_7b_python": (meta_code(4096, 32, 32), 32000),
    "codellama_13b": (meta_code(5120, 40, 40), 32016),
    "codellama_13b_python": (meta_code(5120, 40, 40), 32000),
    "codellama_34b": (meta_code(8192, 48, 64, n_kv_heads=8), 32000),
    "codellama_70b": (meta_code(8192, 80, 64, n_kv_heads=8, ffn_dim_multiplier=1.3, multiple_of=4096), 32016),
    "llama3_8b": (meta_3(4096, 32, 32, 1.3, 1024), 128256),
    "llama3_70b": (meta_3(8192, 80, 64, 1.3, 4096), 128256),
    "llama3_1_8b": (meta_3(4096, 32, 32, 1.3, 1024, use_scaled_rope=True), 128256),
    "llama3_1_70b": (meta_3(8192, 80, 64, 1.3, 4096, use_scaled_rope=True), 128256),
    "llama3_1_405b": (meta_3(16384, 126, 128, 1.2, 4096, use_scaled_rope=True), 128256),
    "llama3_2_1b": (meta_3(2048, 16, 32, 1.5, 256, use_scaled_rope=True), 128256),
    "llama3_2_3b": (meta_3(3072, 28, 24, 1.0, 256, use_scaled_rope=True), 128256),
    "llama3_3_70b": (meta_3(8192, 80, 64, 1.3, 4096, use_scaled_rope=True), 128256),
}


@pytest.mark.parametrize("name", META)
def test_metas_file_gives_the_preset_and_says_where_the_context_comes_from(name):
    params, vocab_size = META[name]
    config, notes = from_meta(params, vocab_size=vocab_size, tied_head=PRESETS[name].tied_head)
    assert config == PRESETS[name]
    assert len(notes) == 1
    assert notes[0].startswith(f"context {config.max_length}, as llama") or notes[0].startswith(
        f"context {config.max_length}, as codellama"
    )


@pytest.mark.parametrize("name", ["llama2_7b", "llama3_1_8b"])
def test_everything_may_sit_under_a_model_key(name):
    params, vocab_size = META[name]
    assert from_meta({"model": params}, vocab_size=vocab_size, tied_head=False)[0] == PRESETS[name]


def test_a_head_of_its_own_changes_the_config_and_not_the_context():
    config, _ = from_meta(META["llama3_2_1b"][0], vocab_size=128256, tied_head=False)
    assert config == dataclasses.replace(PRESETS["llama3_2_1b"], tied_head=False)


def test_the_context_given_overrides_the_presets_and_needs_no_note():
    config, notes = from_meta(meta_7b(), vocab_size=32000, tied_head=False, max_length=512)
    assert (config, notes) == (dataclasses.replace(PRESETS["llama2_7b"], max_length=512), [])


@pytest.mark.parametrize("change", [dict(n_layers=31), dict(norm_eps=1e-4), dict(rope_theta=3e4), dict(n_kv_heads=4)])
def test_the_context_of_an_unpublished_model_is_2048_with_a_warning(change):
    config, notes = from_meta(meta_7b(**change), vocab_size=32000, tied_head=False)
    assert config.max_length == 2048
    assert len(notes) == 1 and notes[0].startswith("warning: no published model") and "--max-length" in notes[0]


@pytest.mark.parametrize(
    "dim, n_layers, n_heads, factor",
    [(2048, 16, 32, 32.0), (3072, 28, 24, 32.0), (4096, 32, 32, 8.0), (8192, 80, 64, 8.0), (2048, 17, 32, 8.0)],
)
def test_scaled_rope_is_32_for_the_two_small_models_and_8_for_others(dim, n_layers, n_heads, factor):
    params = meta_3(dim, n_layers, n_heads, 1.0, 256, use_scaled_rope=True)
    config, _ = from_meta(params, vocab_size=128256, tied_head=False)
    assert (config.rope_type, config.rope_factor, config.rope_original_length) == ("llama3", factor, 8192)
    assert (config.rope_low_freq_factor, config.rope_high_freq_factor) == (1.0, 4.0)
    stated, _ = from_meta(params | dict(rope_scaling_factor=4), vocab_size=128256, tied_head=False)
    assert stated.rope_factor == 4.0


def test_rope_is_not_scaled_unless_the_file_says_so():
    config, _ = from_meta(meta_3(2048, 16, 32, 1.5, 256, use_scaled_rope=False), vocab_size=128256, tied_head=True)
    assert (config.rope_type, config.rope_factor) == ("default", 1.0)


@pytest.mark.parametrize(
    "key, value",
    [
        ("quantization_args", {"scheme": "int4_weight_int8_dynamic_activation", "group_size": 32}),
        ("lora_args", {"rank": 16, "scale": 2.0}),
        ("vision_chunk_size", 448),
        ("moe", {"num_experts": 8}),
        ("use_qk_norm", True),
    ],
)
def test_an_unknown_key_is_refused_by_name_unless_it_is_off(key, value):
    with refused(ExitCode.BAD_CONFIG, f"params.json says {key}=.*does not compute"):
        from_meta(meta_7b(**{key: value}), vocab_size=32000, tied_head=False)
    for off in (None, False):
        config, _ = from_meta(meta_7b(**{key: off}), vocab_size=32000, tied_head=False)
        assert config == PRESETS["llama2_7b"]


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads"])
def test_a_missing_size_is_named(key):
    params = {k: v for k, v in meta_7b().items() if k != key}
    with refused(ExitCode.BAD_CONFIG, f"params.json lacks {key}: "):
        from_meta(params, vocab_size=32000, tied_head=False)


def test_another_vocabulary_than_the_embeddings_is_refused():
    with refused(ExitCode.VOCAB_MISMATCH, "params.json says 128256 tokens, the embedding has 32000 rows"):
        from_meta(meta_7b(vocab_size=128256), vocab_size=32000, tied_head=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_heads=33), "dim 4096 is not a multiple of n_heads 33"),
        (dict(n_heads=0), "n_heads is 0, expected a positive integer"),
        (dict(multiple_of=0), "multiple_of is 0, expected a positive integer"),
        (dict(ffn_dim_multiplier="1.3"), "ffn_dim_multiplier is '1.3', expected a number"),
        (dict(n_kv_heads=5), "32 query heads cannot share 5"),
        (dict(n_layers=0), "n_layers is 0"),
        (dict(model=7), "params.json holds int, expected an object"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with refused(ExitCode.BAD_CONFIG, message):
        from_meta(meta_7b(**change), vocab_size=32000, tied_head=False)


# HF's config.json.


def hf(**change: Any) -> dict[str, Any]:
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=320, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, intermediate_size=80, max_position_embeddings=256,
        rms_norm_eps=1e-5, hidden_act="silu", bos_token_id=1, eos_token_id=2, initializer_range=0.02, use_cache=True,
    ) | change  # fmt: skip


LLAMA3_SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)

ROPES = {  # type: (rope_scaling, what ModelConfig then says)
    "default": (None, {}),
    "linear": (dict(factor=4.0), dict(rope_factor=4.0)),
    "dynamic": (dict(factor=2.0), dict(rope_factor=2.0, rope_original_length=256, max_length=512)),
    "yarn": (
        dict(factor=16.0, original_max_position_embeddings=64),
        dict(rope_factor=16.0, rope_original_length=64, rope_attention_factor=0.1 * math.log(16) + 1),
    ),
    "llama3": (LLAMA3_SCALING, dict(rope_factor=8.0, rope_original_length=8192)),
}


@pytest.mark.parametrize("kind", ROPES)
def test_old_and_new_names_of_rope_give_the_same_config(kind):
    scaling, fields = ROPES[kind]
    expected = dataclasses.replace(TINY, rope_type=kind, rope_theta=5e5, **fields)
    old = [dict(type=kind) | scaling, dict(rope_type=kind) | scaling] if scaling else [None, dict(type=kind)]
    new = dict(rope_type=kind, rope_theta=500000.0, partial_rotary_factor=1.0) | (scaling or {})
    for change in (*(dict(rope_theta=500000.0, rope_scaling=each) for each in old), dict(rope_parameters=new)):
        assert from_huggingface(hf(**change)) == (expected, []), change


def test_storage_and_other_names_that_change_nothing_are_read_over():
    old = hf(torch_dtype="float16", pretraining_tp=2, attention_dropout=0.0, rope_scaling=None, transformers_version="4.31.0")
    new = hf(dtype="bfloat16", rope_parameters=dict(rope_type="default", rope_theta=1e4), transformers_version="5.0.0")
    assert from_huggingface(old) == from_huggingface(new) == (TINY, [])


def test_what_old_files_leave_out_is_what_llama_1_was():
    config = hf()
    for name in ("num_key_value_heads", "head_dim", "hidden_act", "model_type"):
        del config[name]
    read, notes = from_huggingface(config)
    assert read == dataclasses.replace(TINY, num_kv_heads=6, head_dim=8) and notes == []


def test_a_head_width_that_is_not_the_quotient_is_honoured():
    assert from_huggingface(hf(head_dim=64))[0].head_dim == 64
    assert from_huggingface(hf(head_dim=None))[0].head_dim == 48 // 6


def test_a_tied_head_is_read():
    assert from_huggingface(hf(tie_word_embeddings=True))[0] == dataclasses.replace(TINY, tied_head=True)


def test_the_context_is_the_larger_length_stated_or_the_one_given():
    vicuna = hf(max_sequence_length=1024, rope_scaling=dict(type="linear", factor=4.0))
    assert from_huggingface(vicuna)[0].max_length == 1024
    assert from_huggingface(vicuna, max_length=100)[0].max_length == 100
    assert from_huggingface(hf(max_sequence_length=None))[0].max_length == 256


def test_a_context_that_is_not_stated_is_2048_with_a_warning():
    config = hf()
    del config["max_position_embeddings"]
    read, notes = from_huggingface(config)
    assert read.max_length == 2048
    assert len(notes) == 1 and notes[0].startswith("warning: config.json has no max_position_embeddings")
    assert from_huggingface(config, max_length=99) == (dataclasses.replace(TINY, max_length=99), [])


@pytest.mark.parametrize(
    "name, value",
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 4096),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("attention_multiplier", 0.5),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8.0),
        ("query_pre_attn_scalar", 256),
        ("qk_norm", True),
        ("use_qk_norm", True),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("no_rope_layers", [1, 1, 0]),
        ("alibi", True),
    ],
)
def test_an_attribute_that_changes_the_mathematics_is_refused_by_name(name, value):
    with refused(ExitCode.BAD_CONFIG, f"config.json says {name}=.*changes the mathematics.*it handles {name} = "):
        from_huggingface(hf(**{name: value}))


@pytest.mark.parametrize(
    "change",
    [
        dict(attention_bias=False, mlp_bias=False, sliding_window=None, quantization_config=None),
        dict(hidden_act="swish", partial_rotary_factor=1.0, embedding_multiplier=1.0, num_experts=0),
        dict(layer_types=["full_attention"] * 3),
    ],
)
def test_attributes_that_change_nothing_are_accepted(change):
    assert from_huggingface(hf(**change)) == (TINY, [])


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps"]
)
def test_a_missing_size_of_config_json_is_named(name):
    with refused(ExitCode.BAD_CONFIG, f"config.json lacks {name}: "):
        from_huggingface({k: v for k, v in hf().items() if k != name})


@pytest.mark.parametrize(
    "scaling, message",
    [
        (dict(type="longrope", factor=2.0), "rope type 'longrope', which is unknown; known: default, linear"),
        (dict(type="linear"), "rope type linear: factor is None, expected a number"),
        (dict(type="linear", factor="4"), "rope type linear: factor is '4', expected a number"),
        (dict(type="linear", factor=4.0, short_factor=[1.0]), r"rope type 'linear' with \['short_factor'\]"),
        (dict(rope_type="llama3", factor=8.0), "low_freq_factor is None, expected a number"),
        (dict(rope_type="yarn", factor=4.0, low_freq_factor=1.0), "'low_freq_factor'"),
        (dict(type="dynamic", factor=2.0, original_max_position_embeddings=64), "dynamic scaling from 64 with max_position"),
        (dict(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(type="linear", factor=0.0), r"rope_factor is 0\.0, expected a positive number"),
        ([1, 2], r"rope_scaling is \[1, 2\], expected an object"),
    ],
)
def test_a_rope_that_is_not_computed_is_refused(scaling, message):
    with refused(ExitCode.BAD_CONFIG, message):
        from_huggingface(hf(rope_scaling=scaling))


@pytest.mark.parametrize(
    "more, factor",
    [
        ({}, 0.1 * math.log(16) + 1),
        (dict(finetuned=True), 0.1 * math.log(16) + 1),
        (dict(attention_factor=0.9), 0.9),
        (dict(mscale=1.0, mscale_all_dim=0.5), (0.1 * math.log(16) + 1) / (0.05 * math.log(16) + 1)),
        (dict(mscale=0.7), 0.1 * math.log(16) + 1),  # both or none, as transformers reads them
    ],
)
def test_the_temperature_of_yarn_is_read_or_computed(more, factor):
    scaling = dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=64) | more
    assert from_huggingface(hf(rope_scaling=scaling))[0].rope_attention_factor == pytest.approx(factor, rel=1e-12)


def test_the_rest_of_yarn_is_read():
    scaling = dict(
        rope_type="yarn", factor=16.0, original_max_position_embeddings=64, beta_fast=4, beta_slow=0.5, truncate=False
    )
    config, _ = from_huggingface(hf(rope_scaling=scaling))
    assert (config.rope_beta_fast, config.rope_beta_slow, config.rope_truncate) == (4.0, 0.5, False)


def test_sizes_that_do_not_divide_are_refused():
    with refused(ExitCode.BAD_CONFIG, "hidden_size 48 is not a multiple of 7 heads"):
        from_huggingface(hf(num_attention_heads=7, head_dim=None))


# Whatever a file holds, it is read or refused: nothing but a LlamaError escapes.

ODD = (None, True, -1, 0, 2.5, math.nan, math.inf, "", "1", [], [[1]], {}, {"factor": 2.0})


def escapes(read: Callable[[Any], object]) -> dict[str, str]:
    """The odd values on which `read` raises something else than LlamaError, and what."""
    found = {}
    for value in ODD:
        try:
            read(value)
        except LlamaError:
            pass
        except Exception as error:
            found[repr(value)] = repr(error)
    return found


@pytest.mark.parametrize("key", [*meta_70b(), "rope_theta", "use_scaled_rope", "rope_scaling_factor", "model", "lora_args"])
def test_any_value_in_params_json_is_read_or_refused(key):
    file = meta_70b(use_scaled_rope=True)
    assert escapes(lambda value: from_meta(file | {key: value}, vocab_size=32000, tied_head=False)) == {}


NAMES = ["rope_theta", "rope_scaling", "rope_parameters", "layer_types", "max_sequence_length", "tie_word_embeddings"]


@pytest.mark.parametrize("key", [*hf(), *NAMES])
def test_any_value_in_config_json_is_read_or_refused(key):
    assert escapes(lambda value: from_huggingface(hf() | {key: value})) == {}


YARN = ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"]


@pytest.mark.parametrize(
    "kind, key",
    [(kind, key) for kind in ROPES for key in ["rope_type", "rope_theta", *LLAMA3_SCALING, *(YARN * (kind == "yarn"))]],
)
def test_any_value_in_rope_scaling_is_read_or_refused(kind, key):
    scaling = dict(rope_type=kind) | (ROPES[kind][0] or {})
    assert escapes(lambda value: from_huggingface(hf(rope_scaling=scaling | {key: value}))) == {}
