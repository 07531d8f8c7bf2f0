"""How prompts are read: whole or in chunks, or what follows a prefix."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import ModelConfig
from llama_jax.generation import programs
from llama_jax.generation.request import Row, to_controls
from llama_jax.generation.state import DecodeState, Output, Prefix
from llama_jax.model import KVCache, Params
from llama_jax.ops.kernels import Kernels

MIN_PROMPT_BUCKET = 16
SLOT_MULTIPLE = 128  # of a cache, as kernels cut it
PREFILL_CHUNK = 4096  # tokens of each prompt that are read at once: what bounds the memory of reading a long one


def bucket(n: int, largest: int, smallest: int = 1) -> int:
    """The smallest power of two that holds n, between the two bounds: programs are compiled per bucket, not per size."""
    size = smallest
    while size < n:
        size *= 2
    return min(size, largest)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if differs.size else n


class Reader:
    """From rows to the state that decoding starts from, for one set of parameters.

    Attributes:
        max_length: tokens a sequence may have, prompt and answer together.
        mesh: what the parameters lie on; None for one device.
        kernels: which of the platform's kernels programs may use (llama_jax.ops.kernels.probe.choose_kernels).
        cache_dtype: of keys and values, one of llama_jax.choices.CACHE_DTYPES.
        chunk: tokens of each prompt that are read at once.
        most_slots: of a cache that holds max_length tokens, and what kernels fill up.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        max_length: int,
        mesh: Mesh | None = None,
        *,
        kernels: Kernels = True,
        slack: int = 0,
        cache_dtype: str = "auto",
    ):
        self.cfg = cfg
        self.params = params
        self.max_length = max_length
        self.mesh = mesh
        self.kernels = kernels
        self.chunk = PREFILL_CHUNK
        self.cache_dtype = cache_dtype
        slots = max_length + slack
        self.most_slots = slots if slots < SLOT_MULTIPLE else -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE

    def prefix(self, tokens: Sequence[int]) -> Prefix:
        """Reads tokens, for rows that begin with them."""
        batch = self.batch(1)
        lengths = np.ones(batch, np.int32)
        lengths[0] = len(tokens)
        cache, _ = self._read([tokens], batch, lengths, self._padded(len(tokens)))
        return Prefix(tuple(tokens), self.on_mesh(programs.first_row, cache))

    def kept(self, cache: KVCache, tokens: Sequence[int]) -> Prefix:
        """What the first row has read in the end: its tokens but the last, which the cache may not have."""
        return Prefix(tuple(tokens[:-1]), self.on_mesh(programs.first_row, cache))

    def prefill(
        self, rows: Sequence[Row], batch: int, num_top: int, prefix: Prefix | None = None
    ) -> tuple[DecodeState, Output]:
        """The state after the prompts, and the first token of every answer [batch, 1].

        Args:
            batch: from `batch(len(rows))`.
            num_top: alternatives to report per token.
            prefix: what has been read before; as much of it as all rows begin with is not read again.
        """
        prompts = [row.tokens for row in rows]
        tokens, lengths = self.pad(prompts, batch)
        controls = to_controls(rows, batch, self.cfg.vocab_size)
        cache_length = bucket(tokens.shape[1] + programs.CHUNK, self.most_slots, MIN_PROMPT_BUCKET)
        if (start := self._start(prompts, prefix)) or tokens.shape[1] > self.chunk:
            known = prefix._replace(tokens=prefix.tokens[:start]) if start else None
            cache, last = self._read(prompts, batch, lengths, cache_length, controls.rope_length, known)
            whole = None if controls.bias is None else tokens
            return self.on_mesh(programs.begin, self.cfg, self.params, cache, last, whole, lengths, controls, num_top=num_top)
        return self.on_mesh(
            programs.prefill,
            self.cfg,
            self.params,
            tokens,
            lengths,
            controls,
            cache_length=cache_length,
            num_top=num_top,
            kernels=self.kernels,
            cache_dtype=self.cache_dtype,
        )

    def _start(self, prompts: Sequence[Sequence[int]], prefix: Prefix | None) -> int:
        """How many tokens of a prefix need not be read again: all prompts begin with them, and have one more to be answered.

        What is left to read is padded, and must end where the cache may; none where that is as much as the whole.
        """
        if prefix is None:
            return 0
        longest = max(map(len, prompts))
        shared = min(common_length(prefix.tokens, prompt[:-1]) for prompt in prompts)
        left = self._padded(longest - shared)
        return min(shared, self.max_length - left) if left < self._padded(longest) else 0

    def _padded(self, length: int) -> int:
        """So many tokens as programs read them: a bucket, or whole chunks."""
        if length <= self.chunk:
            return bucket(length, self.max_length, MIN_PROMPT_BUCKET)
        return min(-(-length // self.chunk) * self.chunk, self.max_length)

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        batch: int,
        lengths: np.ndarray,
        cache_length: int,
        rope_length: np.ndarray | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[KVCache, jax.Array]:
        """Prompts, chunk by chunk, or what follows a prefix: programs.read, programs.extend."""
        start = len(prefix.tokens) if prefix else 0
        rope_length = lengths if rope_length is None else rope_length
        tokens = np.zeros((batch, start + self._padded(max(map(len, prompts)) - start)), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        if prefix:
            cache = self.on_mesh(programs.spread, prefix.cache, batch=batch, cache_length=cache_length)
            last = np.zeros((batch, 1, self.cfg.embed_dim), self.params["embedding"].dtype)
        else:
            start = min(self.chunk, tokens.shape[1])
            cache, last = self.on_mesh(
                programs.read,
                self.cfg,
                self.params,
                tokens[:, :start],
                lengths,
                rope_length,
                cache_length=cache_length,
                kernels=self.kernels,
                cache_dtype=self.cache_dtype,
            )
        for at in range(start, tokens.shape[1], self.chunk):
            piece = (tokens[:, at : at + self.chunk], np.int32(at), lengths, rope_length)
            cache, last = self.on_mesh(programs.extend, self.cfg, self.params, cache, last, *piece, kernels=self.kernels)
        return cache, last

    def pad(self, rows: Sequence[Sequence[int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [batch, bucket] and lengths [batch]; rows that only fill the batch are one token long."""
        tokens = np.zeros((batch, bucket(max(map(len, rows)), self.max_length, MIN_PROMPT_BUCKET)), np.int32)
        lengths = np.ones(batch, np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
            lengths[b] = len(row)
        return tokens, lengths

    def batch(self, rows: int) -> int:
        """Rows of the programs that so many sequences run in: a bucket that the mesh divides."""
        shards = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return shards * bucket(-(-rows // shards), 2**20)

    def on_mesh(self, program: Callable, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return program(*args, **kwargs)
