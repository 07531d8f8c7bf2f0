"""What every source has in common: the names and shapes of a Llama's weights, and `Source`, what a reader returns."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.files import fail, refuse_pointer, shown
from llama_jax.checkpoint.lazy import LazyArray, equal
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError

# our name, in the order of a Source -> (Meta's and llama2.c's name, Hugging Face's name)
LAYER_NAMES = {
    "attn_norm": ("attention_norm.weight", "input_layernorm.weight"),
    "q_proj": ("attention.wq.weight", "self_attn.q_proj.weight"),
    "k_proj": ("attention.wk.weight", "self_attn.k_proj.weight"),
    "v_proj": ("attention.wv.weight", "self_attn.v_proj.weight"),
    "o_proj": ("attention.wo.weight", "self_attn.o_proj.weight"),
    "mlp_norm": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "gate_proj": ("feed_forward.w1.weight", "mlp.gate_proj.weight"),
    "up_proj": ("feed_forward.w3.weight", "mlp.up_proj.weight"),
    "down_proj": ("feed_forward.w2.weight", "mlp.down_proj.weight"),
}
META, HUGGING_FACE = 0, 1
EMBEDDING = ("tok_embeddings.weight", "model.embed_tokens.weight")
FINAL_NORM = ("norm.weight", "model.norm.weight")
LM_HEAD = ("output.weight", "lm_head.weight")
LAYER = ("layers.{}.", "model.layers.{}.")

FLOATS = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.float64))


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint of somebody else's, opened: nothing of a weight is read before its `read`.

    Attributes:
        kind: "Meta" | "Hugging Face" | "llama2.c".
        path: the folder or file.
        config: with tied_head as the weights have it.
        dtype: of the weights, the widest if they are mixed.
        params: our names and shapes (design.md), RoPE pairs as halves: "embedding", "layers.0.attn_norm", "layers.0.q_proj"
            [N, H, D], ..., "final_norm", "lm_head" (absent when tied), in this order.
        raw: the source's own names, shards merged, nothing permuted or reshaped.
        files: every weight and config file that was used.
        tokenizer: the tokenizer files found.
        notes: sentences for the user; what needs attention begins with "warning: ".
    """

    kind: str
    path: Path
    config: ModelConfig
    dtype: np.dtype
    params: dict[str, LazyArray]
    raw: dict[str, LazyArray]
    files: tuple[Path, ...]
    tokenizer: tuple[Path, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the user calls the model: the folder's name, which may be "original" or "meta" inside the model's."""
        folder = self.path.absolute() if self.path.is_dir() else self.path.absolute().parent
        return f"{folder.parent.name} {folder.name}" if folder.name in ("original", "meta") else folder.name

    def noted(self, note: str) -> "Source":
        """The same with one more note."""
        return dataclasses.replace(self, notes=(*self.notes, note))


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by the last part of its name."""
    V, D, N, K, H, F = cfg.vocab_size, cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.mlp_dim
    return {
        "embedding": (V, D), "attn_norm": (D,), "q_proj": (N, H, D), "k_proj": (K, H, D), "v_proj": (K, H, D),
        "o_proj": (D, N, H), "mlp_norm": (D,), "gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F),
        "final_norm": (D,), "lm_head": (V, D),
    }  # fmt: skip


def flat_shape(cfg: ModelConfig, leaf: str) -> tuple[int, ...]:
    """Shape of a weight as every source stores it: heads and head width are one axis."""
    shape = shapes(cfg)[leaf]
    if leaf == "o_proj":
        return (shape[0], math.prod(shape[1:]))
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) == 3 else shape


def names(cfg: ModelConfig, family: int) -> Iterator[tuple[str, str]]:
    """Our name and the source's, in the order of Source.params; lm_head unless the config says that it is tied."""
    yield "embedding", EMBEDDING[family]
    for i in range(cfg.num_layers):
        for leaf, theirs in LAYER_NAMES.items():
            yield f"layers.{i}.{leaf}", LAYER[family].format(i) + theirs[family]
    yield "final_norm", FINAL_NORM[family]
    if not cfg.tied_head:
        yield "lm_head", LM_HEAD[family]


def leaf_of(name: str) -> str:
    return name.rpartition(".")[2]


def configured(
    read: Callable[..., tuple[ModelConfig, list[str]]], values: Mapping[str, Any], where: Path, **more: Any
) -> tuple[ModelConfig, list[str]]:
    """Calls from_meta or from_huggingface; what they refuse names the file."""
    try:
        return read(values, **more)
    except LlamaError as e:
        raise LlamaError(e.code, f"{where.parent if where.name in str(e) else where}: {e}") from e


def check_names(raw: Mapping[str, LazyArray], cfg: ModelConfig, family: int, where: Path) -> None:
    """Every tensor the config asks for is there, and no other (a tied head may be).

    Raises:
        LlamaError: MISSING_TENSOR or UNKNOWN_TENSOR, with the first few names.
    """
    table = (theirs for _, theirs in names(cfg, family))
    missing = list(itertools.islice((name for name in table if name not in raw), 5))  # a config may say 10^12 layers
    unknown = [name for name in raw if not _is_known(name, cfg, family)]
    if missing:
        instead = f"; it holds {_some(unknown)}, which no Llama has" if unknown else ""
        fail(
            ExitCode.MISSING_TENSOR,
            f"{where} lacks {_some(missing)}, which a model of {cfg.num_layers} layers has{instead}: the config "
            "belongs to another model, or a file is missing",
        )
    if unknown:
        fail(
            ExitCode.UNKNOWN_TENSOR,
            f"{where} holds {_some(unknown)}, which a model of {cfg.num_layers} layers does not have: the config "
            "belongs to another model, or this is none of Llama 1 to 3.3",
        )


def _is_known(name: str, cfg: ModelConfig, family: int) -> bool:
    if name in (EMBEDDING[family], FINAL_NORM[family], LM_HEAD[family]):
        return True
    prefix, end = LAYER[family].split("{}")
    number, _, leaf = name.removeprefix(prefix).partition(end)
    if not number.isdecimal() or len(number) > 9 or int(number) >= cfg.num_layers:
        return False
    return any(
        name == f"{prefix}{int(number)}{end}{theirs[family]}" for theirs in LAYER_NAMES.values() if theirs[family] == leaf
    )


def _some(found: Sequence[str]) -> str:
    return ", ".join(shown(name) for name in found[:4]) + (" and others" if len(found) > 4 else "")


def check_dtype(name: str, array: LazyArray, where: Path) -> None:
    if array.dtype not in FLOATS:
        fail(
            ExitCode.WRONG_SHAPE,
            f"{where}: {shown(name)} is {array.dtype}, expected float16, bfloat16, float32 or float64: "
            "quantised weights are not read",
        )


def assemble(
    cfg: ModelConfig, raw: Mapping[str, LazyArray], family: int, where: Path, *, interleaved: bool
) -> tuple[ModelConfig, dict[str, LazyArray]]:
    """Params under our names from raw tensors that are all there.

    Args:
        cfg: tied_head as the config file has it; a head that equals the embedding byte for byte makes it True.
        raw: the merged tensors under their own names.
        family: META or HUGGING_FACE.
        where: the path, for messages.
        interleaved: q and k rows have interleaved RoPE pairs.

    Raises:
        LlamaError: WRONG_SHAPE, or BAD_CONFIG when the config says tied and the head is another table.
    """
    table = dict(names(cfg, family))
    if LM_HEAD[family] in raw:
        table["lm_head"] = LM_HEAD[family]
    for name, theirs in table.items():
        check_dtype(theirs, raw[theirs], where)
        expected = flat_shape(cfg, leaf_of(name))
        if raw[theirs].shape != expected:
            fail(
                ExitCode.WRONG_SHAPE,
                f"{where}: {theirs} has shape {shown(raw[theirs].shape)}, the config asks for {shown(expected)}: "
                "the config belongs to another model",
            )
    if "lm_head" in table:
        tied = equal(raw[LM_HEAD[family]], raw[EMBEDDING[family]])
        if cfg.tied_head and not tied:
            fail(
                ExitCode.BAD_CONFIG,
                f"{where}: the config says tie_word_embeddings, and {LM_HEAD[family]} differs from {EMBEDDING[family]}: "
                "one of them is wrong; set tie_word_embeddings to false if the head was trained",
            )
        if tied:
            del table["lm_head"]
        cfg = dataclasses.replace(cfg, tied_head=tied)
    return cfg, {name: _ours(raw[theirs], leaf_of(name), cfg.head_dim, interleaved) for name, theirs in table.items()}


def _ours(array: LazyArray, leaf: str, head_dim: int, interleaved: bool) -> LazyArray:
    if leaf in ("q_proj", "k_proj", "v_proj"):
        array = array.split(0, head_dim)
        return array.rope_halves() if interleaved and leaf != "v_proj" else array
    return array.split(1, head_dim) if leaf == "o_proj" else array


def widest(params: Mapping[str, LazyArray]) -> np.dtype:
    """The dtype that holds every weight exactly."""
    found = {array.dtype for array in params.values()}
    if len(found) == 1:
        return found.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in found else np.float32)


def tokenizer_files(folders: Sequence[Path], wanted: Sequence[str]) -> tuple[Path, ...]:
    """The wanted files of the first folder that has any.

    Raises:
        LlamaError: LFS_POINTER when one is a git-lfs pointer.
    """
    for folder in folders:
        found = tuple(refuse_pointer(folder / name) for name in wanted if (folder / name).is_file())
        if found:
            return found
    return ()
