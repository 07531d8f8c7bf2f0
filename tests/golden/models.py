"""The small random models of every family whose logits are recorded in logits.npz, and how to make their weights again.

Imports NumPy only: record.py runs it beside torch, the tests beside JAX. Weights and tokens come from PCG64's raw bits, the
one stream NumPy promises never to change.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

RECORDED = pathlib.Path(__file__).with_name("logits.npz")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and one sequence.

    Attributes:
        config_json: config.json as some version of transformers or some publisher wrote it.
        seed: of the weights and tokens.
        positions: [T]. Where they jump, RoPE has to get distances of thousands of tokens right.
        exact_angles: recorded with transformers' frequencies and angles computed in float64. In its float32, as in Meta's, a
            frequency is off by about 1e-7 of itself and an angle by half a unit in its last place, 0.004 at 100,000.
        greedy: how many tokens of greedy continuation are recorded, after the first PROMPT tokens.
    """

    config_json: Mapping[str, Any]
    seed: int
    positions: np.ndarray
    exact_angles: bool = False
    greedy: int = 0

    @property
    def tokens(self) -> np.ndarray:
        """[T] int32."""
        return (_uniform((self.seed, 0), len(self.positions)) * self.config_json["vocab_size"]).astype(np.int32)


PROMPT = 12


def weights(case: Case) -> dict[str, np.ndarray]:
    """Every parameter as float32 under the name in HF's safetensors, [out, in]; no lm_head when the config ties it.

    Scales give logits of about 2, norm weights of 0.8 to 1.2, and scores of about 2, so that attention is far from uniform.
    Embeddings are small, as in the released models: so a wrong norm epsilon shows.
    """
    c = case.config_json
    D, F, V, N = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_attention_heads"]
    K, H, tied = c.get("num_key_value_heads", N), c.get("head_dim", D // N), c.get("tie_word_embeddings", False)
    spreads: dict[str, tuple[tuple[int, ...], float]] = {
        "model.embed_tokens.weight": ((V, D), 2 * D**-0.5 if tied else 0.05),
        "model.norm.weight": ((D,), 0.0),
    }
    if not tied:
        spreads["lm_head.weight"] = ((V, D), 2 * D**-0.5)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        spreads |= {
            f"{layer}.input_layernorm.weight": ((D,), 0.0),
            f"{layer}.self_attn.q_proj.weight": ((N * H, D), 1.5 * D**-0.5),
            f"{layer}.self_attn.k_proj.weight": ((K * H, D), 1.5 * D**-0.5),
            f"{layer}.self_attn.v_proj.weight": ((K * H, D), D**-0.5),
            f"{layer}.self_attn.o_proj.weight": ((D, N * H), (N * H) ** -0.5),
            f"{layer}.post_attention_layernorm.weight": ((D,), 0.0),
            f"{layer}.mlp.gate_proj.weight": ((F, D), D**-0.5),
            f"{layer}.mlp.up_proj.weight": ((F, D), D**-0.5),
            f"{layer}.mlp.down_proj.weight": ((D, F), F**-0.5),
        }
    result = {}
    for index, (name, (shape, deviation)) in enumerate(spreads.items(), start=1):
        centred = 2 * _uniform((case.seed, index), int(np.prod(shape))) - 1
        values = 1 + 0.2 * centred if len(shape) == 1 else deviation * 3**0.5 * centred
        result[name] = values.astype(np.float32).reshape(shape)
    return result


def checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """CRC-32 over the arrays in order: recorded, so that other weights are told apart from other logits."""
    crc = 0
    for value in arrays.values():
        crc = zlib.crc32(np.ascontiguousarray(value).tobytes(), crc)
    return crc


def _uniform(seed: tuple[int, ...], size: int) -> np.ndarray:
    """[size] float64 in [0, 1)."""
    return (np.random.PCG64(seed).random_raw(size) >> np.uint64(11)) * 2.0**-53


def _config(
    vocab: int, embed: int, layers: int, heads: int, mlp: int, length: int, eps: float = 1e-5, **more
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": embed,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "max_position_embeddings": length,
        "rms_norm_eps": eps,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    } | more


def _llama3_rope(factor: float) -> dict[str, Any]:
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor} | bounds


def _jumps(*starts: int, run: int = 16) -> np.ndarray:
    """`run` tokens from each start."""
    return np.concatenate([np.arange(start, start + run) for start in starts])


NEAR = np.arange(48)
FAR = _jumps(0, 8184, 100_000)  # within the old context, across its end, deep in the new one

LLAMA3_1 = _config(
    288, 48, 3, 6, 104, 131072, num_key_value_heads=2, head_dim=16, rope_theta=500000.0, rope_scaling=_llama3_rope(8.0),
    tie_word_embeddings=False, torch_dtype="bfloat16", attention_bias=False, mlp_bias=False, pretraining_tp=1,
)  # fmt: skip
LLAMA3_2 = _config(
    224, 48, 2, 4, 112, 131072, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, dtype="bfloat16",
    rope_parameters={"rope_theta": 500000.0} | _llama3_rope(32.0), attention_bias=False, mlp_bias=False,
)  # fmt: skip
YARN_LLAMA2 = _config(
    192, 56, 2, 4, 96, 65536, num_key_value_heads=4, tie_word_embeddings=False,
    rope_scaling={"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True},
)  # fmt: skip

CASES: dict[str, Case] = {
    # Before grouped attention: no num_key_value_heads, rope_theta or tie_word_embeddings in the file.
    "llama1": Case(_config(160, 60, 3, 6, 88, 2048, eps=1e-6, torch_dtype="float16"), 1, NEAR),
    "llama2": Case(
        _config(320, 48, 3, 6, 80, 4096, num_key_value_heads=2, rope_scaling=None, tie_word_embeddings=False, pretraining_tp=1),
        13,
        NEAR,
        greedy=16,
    ),
    "codellama": Case(_config(176, 64, 2, 4, 96, 16384, num_key_value_heads=2, rope_theta=1000000), 3, NEAR),
    "llama3": Case(
        _config(
            256, 60, 2, 6, 112, 8192, num_key_value_heads=3, head_dim=10, dtype="bfloat16", tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
        4,
        NEAR,
    ),
    "llama3_1": Case(LLAMA3_1, 5, NEAR, greedy=16),
    "llama3_1_far": Case(LLAMA3_1, 5, FAR, exact_angles=True),
    "llama3_2": Case(LLAMA3_2, 12, NEAR, greedy=16),
    "llama3_2_far": Case(LLAMA3_2, 12, FAR, exact_angles=True),
    # Vicuna's 16k models: max_position_embeddings is the length before stretching.
    "linear": Case(
        _config(
            208, 48, 2, 6, 72, 4096, num_key_value_heads=6, max_sequence_length=16384,
            rope_scaling={"type": "linear", "factor": 4.0},
        ),
        7,
        NEAR,
    ),
    "dynamic": Case(
        _config(192, 56, 2, 4, 80, 32, num_key_value_heads=2, rope_scaling={"type": "dynamic", "factor": 2.0}), 8, np.arange(56)
    ),
    "dynamic_short": Case(
        _config(192, 56, 2, 4, 80, 64, num_key_value_heads=2, rope_scaling={"type": "dynamic", "factor": 2.0}), 8, NEAR
    ),
    "yarn_llama2": Case(YARN_LLAMA2, 9, NEAR),
    "yarn_llama2_far": Case(YARN_LLAMA2, 9, _jumps(0, 4080, 60_000), exact_angles=True),
    "yarn_exact_range": Case(
        _config(
            224, 48, 2, 6, 88, 512, num_key_value_heads=3, head_dim=24, tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64,
                "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 0.9,
            },
        ),
        10,
        _jumps(0, 60, 480),
        exact_angles=True,
    ),
    "yarn_mscale": Case(
        _config(
            160, 48, 2, 3, 72, 2048, num_key_value_heads=1, head_dim=20, tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 512,
                "mscale": 1.0, "mscale_all_dim": 0.5,
            },
        ),
        11,
        _jumps(0, 500, 1990),
        exact_angles=True,
    ),
}  # fmt: skip
