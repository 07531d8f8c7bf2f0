"""One small model with a tokenizer, and what a full forward pass says about it.

Programs are compiled once per config and shape, so the tests share CFG, prompts of at most 16 tokens and batches of 1 and 4.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.generation.llama import Llama
from llama_jax.model import forward
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from tests.model.make import SMALL, params_of
from tests.text.make import small_sentencepiece

CFG = dataclasses.replace(SMALL, vocab_size=420, max_length=128)
ONE_LAYER = dataclasses.replace(CFG, num_layers=1)
COMPILED = "/jax/core/compile/backend_compile_duration"

compiled_forward = jax.jit(forward, static_argnums=0)


@functools.cache
def tokenizer_of() -> Tokenizer:
    """As large as CFG's vocabulary: <unk> <s> </s>, bytes, pieces."""
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(small_sentencepiece(Path(folder) / "tokenizer.model", CFG.vocab_size))


def llama_of(cfg: ModelConfig = CFG, **options: Any) -> Llama:
    options = dict(batch_size=4, chat_format="llama2") | options
    return Llama(cfg, params_of(cfg), options.pop("tokenizer", tokenizer_of()), **options)


def ids(length: int, seed: int = 0) -> list[int]:
    """A prompt of ordinary tokens."""
    return np.random.default_rng(seed).integers(3, CFG.vocab_size, length).tolist()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def full_logits(tokens: Sequence[int], cfg: ModelConfig = CFG) -> np.ndarray:
    """[T] -> [T, V] float32 of one forward pass without a cache; padded, so that one program serves every length."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(compiled_forward(cfg, params_of(cfg), padded))[0, : len(tokens)]


def full_logprobs(tokens: Sequence[int], cfg: ModelConfig = CFG) -> np.ndarray:
    """[T] -> [T, V]: log-probabilities of what follows each token."""
    return log_softmax(full_logits(tokens, cfg))


def logprobs_of(prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """Log-probability of each token of an answer, from one forward pass."""
    all_tokens = [*prompt, *answer]
    return full_logprobs(all_tokens)[np.arange(len(prompt) - 1, len(all_tokens) - 1), list(answer)]


@contextlib.contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """A list that gets an entry for every program that XLA compiles in the block."""
    found: list[str] = []

    def listen(event: str, duration: float, **more: Any) -> None:
        if event == COMPILED:
            found.append(str(more.get("fun_name", "a program")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def to_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)
