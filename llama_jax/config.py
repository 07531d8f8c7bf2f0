"""What a Llama is: `ModelConfig` and the published presets.

Imports no jax: run configurations and command lines read this file and must start at once. Numbers come from the papers
(arXiv:2302.13971 table 2, 2307.09288 table 1, 2308.12950, 2407.21783 table 3) and from the released params.json and
config.json files.
"""

import dataclasses
import math
from typing import Any

from llama_jax.errors import ExitCode, LlamaError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that changes what the model computes; flat and hashable, so it is a static argument of jitted functions.

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim: V, D, L, N, K, H, F.
        max_length: context in tokens that the weights were trained or released for.
        norm_eps: epsilon inside the square root of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_type: default | linear | dynamic (NTK) | yarn | llama3; the fields below are read by the types named.
        rope_factor: linear, dynamic, yarn, llama3: how far the context is stretched.
        rope_original_length: dynamic, yarn, llama3: context before stretching.
        rope_low_freq_factor, rope_high_freq_factor: llama3.
        rope_beta_fast, rope_beta_slow, rope_truncate: yarn.
        rope_attention_factor: yarn: multiplies cos and sin.
        tied_head: the embedding is also the output projection; there is no lm_head.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    norm_eps: float
    rope_theta: float
    rope_type: str = "default"
    rope_factor: float = 1.0
    rope_original_length: int = 0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = True
    rope_attention_factor: float = 1.0
    tied_head: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wrong_type = isinstance(value, bool) != (field.type is bool) or not isinstance(
                value, (int, float) if field.type is float else field.type
            )
            if wrong_type:
                raise LlamaError(
                    ExitCode.BAD_CONFIG, f"{field.name} is {value!r}, expected {field.type.__name__}: correct the config"
                )
        for name in SIZES:
            if getattr(self, name) <= 0:
                raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("norm_eps", "rope_factor", "rope_attention_factor", "rope_beta_fast", "rope_beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise LlamaError(ExitCode.BAD_CONFIG, f"{name} is {getattr(self, name)}, expected a positive number")
        if not 1 < self.rope_theta < math.inf:
            raise LlamaError(ExitCode.BAD_CONFIG, f"rope_theta is {self.rope_theta}, expected a number above 1")
        if not -math.inf < self.rope_low_freq_factor < self.rope_high_freq_factor < math.inf:
            raise LlamaError(
                ExitCode.BAD_CONFIG,
                f"rope_low_freq_factor is {self.rope_low_freq_factor}, expected a number below rope_high_freq_factor "
                f"{self.rope_high_freq_factor}",
            )
        if self.num_heads % self.num_kv_heads:
            raise LlamaError(
                ExitCode.BAD_CONFIG,
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads: the first must be a multiple "
                "of the second",
            )
        if self.head_dim % 2:
            raise LlamaError(ExitCode.BAD_CONFIG, f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.rope_type not in ROPE_TYPES:
            raise LlamaError(ExitCode.BAD_CONFIG, f"rope_type {self.rope_type!r} is unknown; known: {', '.join(ROPE_TYPES)}")
        if self.rope_type in ("dynamic", "yarn", "llama3") and self.rope_original_length <= 0:
            raise LlamaError(ExitCode.BAD_CONFIG, f"rope_type {self.rope_type!r} needs rope_original_length")

    @property
    def num_params(self) -> int:
        """Parameters in all, a tied head counted once."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.embed_dim * self.mlp_dim + 2 * self.embed_dim
        tables = (1 if self.tied_head else 2) * self.vocab_size * self.embed_dim
        return tables + self.num_layers * layer + self.embed_dim


SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_length")


def mlp_dim_rule(embed_dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's feed-forward width: two thirds of 4 D, times the multiplier, rounded up (facebookresearch/llama model.py)."""
    width = int(2 * (4 * embed_dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def _llama(vocab, embed, layers, heads, kv_heads, mlp, length, eps=1e-5, theta=1e4, head_dim=128, **more) -> ModelConfig:
    return ModelConfig(vocab, embed, layers, heads, kv_heads, head_dim, mlp, length, eps, theta, **more)


def _llama3(factor: float) -> dict[str, Any]:
    return dict(theta=5e5, rope_type="llama3", rope_factor=factor, rope_original_length=8192)


PRESETS: dict[str, ModelConfig] = {
    "llama1_7b": _llama(32000, 4096, 32, 32, 32, 11008, 2048, eps=1e-6),
    "llama1_13b": _llama(32000, 5120, 40, 40, 40, 13824, 2048, eps=1e-6),
    "llama1_33b": _llama(32000, 6656, 60, 52, 52, 17920, 2048, eps=1e-6),
    "llama1_65b": _llama(32000, 8192, 80, 64, 64, 22016, 2048),
    "llama2_7b": _llama(32000, 4096, 32, 32, 32, 11008, 4096),
    "llama2_13b": _llama(32000, 5120, 40, 40, 40, 13824, 4096),
    "llama2_34b": _llama(32000, 8192, 48, 64, 8, 22016, 4096),  # never released; shape inferred from Code Llama 34B
    "llama2_70b": _llama(32000, 8192, 80, 64, 8, 28672, 4096),
    "codellama_7b": _llama(32016, 4096, 32, 32, 32, 11008, 16384, theta=1e6),
    "codellama_7b_python": _llama(32000, 4096, 32, 32, 32, 11008, 16384, theta=1e6),
    "codellama_13b": _llama(32016, 5120, 40, 40, 40, 13824, 16384, theta=1e6),
    "codellama_13b_python": _llama(32000, 5120, 40, 40, 40, 13824, 16384, theta=1e6),
    "codellama_34b": _llama(32000, 8192, 48, 64, 8, 22016, 16384, theta=1e6),
    "codellama_70b": _llama(32016, 8192, 80, 64, 8, 28672, 16384, theta=1e6),
    "llama3_8b": _llama(128256, 4096, 32, 32, 8, 14336, 8192, theta=5e5),
    "llama3_70b": _llama(128256, 8192, 80, 64, 8, 28672, 8192, theta=5e5),
    "llama3_1_8b": _llama(128256, 4096, 32, 32, 8, 14336, 131072, **_llama3(8.0)),
    "llama3_1_70b": _llama(128256, 8192, 80, 64, 8, 28672, 131072, **_llama3(8.0)),
    "llama3_1_405b": _llama(128256, 16384, 126, 128, 8, 53248, 131072, **_llama3(8.0)),
    "llama3_2_1b": _llama(128256, 2048, 16, 32, 8, 8192, 131072, head_dim=64, tied_head=True, **_llama3(32.0)),
    "llama3_2_3b": _llama(128256, 3072, 28, 24, 8, 8192, 131072, tied_head=True, **_llama3(32.0)),
    "llama3_3_70b": _llama(128256, 8192, 80, 64, 8, 28672, 131072, **_llama3(8.0)),
    "tinyllama_1b": _llama(32000, 2048, 22, 32, 4, 5632, 2048, head_dim=64),  # arXiv:2401.02385, table 1
    "stories15m": _llama(32000, 288, 6, 6, 6, 768, 256, head_dim=48, tied_head=True),  # karpathy/llama2.c, README
    "stories110m": _llama(32000, 768, 12, 12, 12, 2048, 1024, head_dim=64, tied_head=True),
    # N, K, H, D and F all differ, so that no swap of axes passes a test.
    "tiny": _llama(320, 48, 3, 6, 2, 80, 256, head_dim=10),
}
