"""llama2.c's .bin files, versions 0 (legacy), 1 (float32) and 2 (int8): a header of seven numbers, then the weights in order.

Layout: llama-facts 3.4 (from karpathy/llama2.c export.py and run.c). Rows of wq and wk have interleaved RoPE pairs, as Meta's.
"""

import dataclasses
import math
import struct
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.files import MappedFile, fail
from llama_jax.checkpoint.layout import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    LAYER_NAMES,
    LM_HEAD,
    META,
    Source,
    assemble,
    check_names,
    flat_shape,
    tokenizer_files,
    widest,
)
from llama_jax.checkpoint.lazy import LazyArray, mapped, mapped_int8
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode

MAGIC = 0x616B3432  # "ak42"
HEADER = 256  # bytes of the header of versions 1 and 2
NORM_EPS, ROPE_THETA = 1e-5, 1e4  # run.c has them as constants
TOKENIZER = ("tokenizer.model", "tokenizer.bin")

# Leaves in the order of the file; a leaf of a layer stands for all layers one after the other.
_ORDER = {
    0: ("embedding", "attn_norm", "q_proj", "k_proj", "v_proj", "o_proj", "mlp_norm", "gate_proj", "down_proj", "up_proj",
        "final_norm", "rope", "lm_head"),
    1: ("attn_norm", "mlp_norm", "final_norm", "embedding", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj",
        "up_proj", "lm_head"),
}  # fmt: skip
_ORDER[2] = _ORDER[1]
_NORMS = ("attn_norm", "mlp_norm", "final_norm")


@dataclasses.dataclass(frozen=True)
class Header:
    """What the first bytes say. `tied`: no head is stored. `group`: int8 values per scale, in version 2."""

    version: int
    sizes: tuple[int, ...]  # dim, hidden_dim, layers, heads, kv heads, vocabulary, context
    tied: bool
    start: int
    group: int = 0


def parse_header(head: bytes) -> Header | None:
    """The header of a llama2.c file from its first 256 bytes; None when it cannot be one.

    Version 0 has no magic number: it is taken for one when all seven numbers are what a model can have.
    """
    if len(head) < 28:
        return None
    if struct.unpack_from("<I", head)[0] == MAGIC:
        if len(head) < HEADER:
            return None
        version, *sizes = struct.unpack_from("<8i", head, 4)
        tied, group = struct.unpack_from("<Bi", head, 36)
        header = Header(version, tuple(sizes), bool(tied), HEADER, group)
    else:
        *sizes, vocab, length = struct.unpack_from("<7i", head)
        header = Header(0, (*sizes, abs(vocab), length), vocab > 0, 28)
    dim, _, _, heads, kv_heads, *_ = header.sizes
    if min(header.sizes) <= 0 or dim % heads or (dim // heads) % 2 or heads % kv_heads:
        return None
    return header


def open_llama2c(path: Path, *, max_length: int | None = None) -> Source:
    """Opens a llama2.c file; see `source.open_source`."""
    file = MappedFile(path)
    header = parse_header(file.data[:HEADER])
    if header is None:
        fail(ExitCode.BAD_HEADER, f"{path} has a header that describes no model: it is no file of llama2.c, or damaged")
    if header.version not in _ORDER or (header.version == 2 and header.group <= 0):
        fail(
            ExitCode.BAD_HEADER,
            f"{path} is version {header.version} of llama2.c's format, groups of {header.group}; versions 0, 1 and 2 are read",
        )
    dim, hidden, layers, heads, kv_heads, vocab, length = header.sizes
    config = ModelConfig(
        vocab_size=vocab, embed_dim=dim, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim // heads,
        mlp_dim=hidden, max_length=max_length or length, norm_eps=NORM_EPS, rope_theta=ROPE_THETA, tied_head=header.tied,
    )  # fmt: skip
    raw = _open_weights(file, header, config)
    check_names(raw, config, META, path)
    config, params = assemble(config, raw, META, path, interleaved=True)
    notes = ["norm_eps is 1e-5 and rope_theta 10,000, as llama2.c computes: the file does not say"]
    if header.version == 2:
        notes.append("the weights were rounded to int8 when the file was made; they are read as float32")
    return Source(
        kind="llama2.c",
        path=path,
        config=config,
        dtype=widest(params),
        params=params,
        raw=raw,
        files=(path,),
        tokenizer=tokenizer_files((path.parent,), TOKENIZER),
        notes=tuple(notes),
    )


@dataclasses.dataclass(frozen=True)
class _Section:
    """Tensors of one kind, one after the other: one, or one of each layer. `group` 0: float32; else int8 and scales."""

    leaf: str
    repeat: int
    shape: tuple[int, ...]
    group: int
    size: int  # bytes of one tensor


def _open_weights(file: MappedFile, header: Header, config: ModelConfig) -> dict[str, LazyArray]:
    """Every tensor by Meta's name, after a comparison of the file's size with what the header describes."""
    sections = _sections(file.path, header, config)
    expected = header.start + sum(section.repeat * section.size for section in sections)
    if expected != file.size:
        short = file.size < expected
        fail(
            ExitCode.TRUNCATED if short else ExitCode.BAD_HEADER,
            f"{file.path} has {file.size} bytes, its header (version {header.version}) describes {expected}: "
            + ("download it again" if short else "it is no file of llama2.c, or damaged"),
        )
    raw: dict[str, LazyArray] = {}
    at = header.start
    for section in sections:
        for i in range(section.repeat):
            if section.group:
                raw[_name(section.leaf, i)] = mapped_int8(file, at, section.shape, section.group)
            elif section.leaf != "rope":
                raw[_name(section.leaf, i)] = mapped(file, at, section.shape, np.dtype(np.float32))
            at += section.size
    return raw


def _sections(path: Path, header: Header, config: ModelConfig) -> list[_Section]:
    """The file in order, after the header."""
    sections = []
    for leaf in _ORDER[header.version]:
        if leaf == "lm_head" and header.tied:
            continue
        # "rope": cos and sin, [context, head_dim / 2] each
        shape = (header.sizes[6], config.head_dim) if leaf == "rope" else flat_shape(config, leaf)
        count = math.prod(shape)
        group = header.group if header.version == 2 and leaf not in _NORMS else 0
        if group and count % group:
            fail(
                ExitCode.BAD_HEADER,
                f"{path}: {leaf} of {count} values does not divide into groups of {group}: the file is damaged",
            )
        size = count + count // group * 4 if group else 4 * count
        sections.append(_Section(leaf, config.num_layers if leaf in LAYER_NAMES else 1, shape, group, size))
    return sections


def _name(leaf: str, layer: int) -> str:
    tables = {"embedding": EMBEDDING, "final_norm": FINAL_NORM, "lm_head": LM_HEAD}
    return tables[leaf][META] if leaf in tables else LAYER[META].format(layer) + LAYER_NAMES[leaf][META]
