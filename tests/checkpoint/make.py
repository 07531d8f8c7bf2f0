"""Writes checkpoints in every format that llama_jax reads, from one dict of random weights; NumPy only, no torch.

All functions take weights under our names and in our shapes (design.md: "embedding", "layers.0.q_proj" [N, H, D], ...; no
"lm_head" means tied) and undo what a reader does: heads and head width become one axis, and for Meta and llama2.c the rows of
q and k go back to interleaved RoPE pairs. Files of `write_torch` can be read by torch.load(weights_only=True) (checked by hand
with torch 2.13: float16, bfloat16, float32, views).

    params = random_params(cfg, seed=0, dtype=ml_dtypes.bfloat16)
    write_meta(folder, cfg, params, shards=2)
"""

import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint.layout import EMBEDDING, FINAL_NORM, HUGGING_FACE, LM_HEAD, META, leaf_of, names, shapes
from llama_jax.config import ModelConfig, mlp_dim_rule

Params = dict[str, np.ndarray]

STORAGE = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long", "int8": "Char"}
SAFE = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int8": "I8"}
CUT = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1, "lm_head": 0}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


def meta_tiny(**changes: Any) -> ModelConfig:
    """A small config that every format can hold (head_dim = D / N); all axes differ, K * H divides by 4 and by 2."""
    sizes = dict(
        vocab_size=40, embed_dim=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=80, max_length=64,
        norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    return ModelConfig(**(sizes | changes))


def random_params(cfg: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Params:
    """Weights ~ N(0, 0.05), norms around 1, in the order of Source.params; no "lm_head" when cfg.tied_head."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, _ in names(cfg, META):
        shape = shapes(cfg)[leaf_of(name)]
        values = rng.normal(1.0 if leaf_of(name).endswith("norm") else 0.0, 0.05, shape)
        params[name] = values.astype(np.float32).astype(dtype)
    return params


def to_flat(cfg: ModelConfig, params: Mapping[str, np.ndarray], family: int, *, interleave: bool) -> Params:
    """Our params -> the tensors of a source under its names (META or HUGGING_FACE), two axes at most."""
    tables = {"embedding": EMBEDDING, "final_norm": FINAL_NORM, "lm_head": LM_HEAD}
    theirs = {ours: name for ours, name in names(cfg, family)} | {ours: pair[family] for ours, pair in tables.items()}
    flat = {}
    for name, value in params.items():
        leaf = leaf_of(name)
        if interleave and leaf in ("q_proj", "k_proj"):
            n, h, d = value.shape
            value = value.reshape(n, 2, h // 2, d).swapaxes(1, 2)
        if leaf in ("q_proj", "k_proj", "v_proj"):
            value = value.reshape(-1, cfg.embed_dim)
        elif leaf == "o_proj":
            value = value.reshape(cfg.embed_dim, -1)
        flat[theirs[name]] = np.ascontiguousarray(value)
    return flat


class View(NamedTuple):
    """A tensor as torch describes it: part of a storage (any flat array), offset and strides in elements."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def write_torch(path: Path, tensors: Mapping[str, np.ndarray | View], root: str | None = None) -> None:
    """A file of torch.save: a dict of tensors. Views of one array object share its storage."""
    views = {name: as_view(value) for name, value in tensors.items()}
    storages: dict[int, tuple[str, np.ndarray]] = {}
    for view in views.values():
        storages.setdefault(id(view.storage), (str(len(storages)), view.storage))
    keys = {address: key for address, (key, _) in storages.items()}
    pickle = state_dict_pickle({name: (keys[id(view.storage)], view) for name, view in views.items()})
    blobs = {f"data/{key}": storage.tobytes() for key, storage in storages.values()}
    write_archive(path, {"data.pkl": pickle, "byteorder": b"little", **blobs, "version": b"3\n"}, root)


def as_view(value: np.ndarray | View) -> View:
    if isinstance(value, View):
        return value
    strides = [1]
    for size in value.shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return View(np.ascontiguousarray(value).reshape(-1), 0, value.shape, tuple(strides[: value.ndim]))


def write_archive(path: Path, entries: Mapping[str, bytes], root: str | None = None) -> None:
    """The zip around a torch pickle: entries stored as they are, under one folder."""
    root = path.stem if root is None else root
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{name}"), data)


def state_dict_pickle(tensors: Mapping[str, tuple[str, View]]) -> bytes:
    """The pickle (protocol 2) of a dict of tensors, each with the key of its storage."""
    items = [_text(name) + _tensor(key, view) for name, (key, view) in tensors.items()]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _tensor(key: str, view: View) -> bytes:
    """_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks) as pickle instructions."""
    kind = f"ctorch\n{STORAGE[view.storage.dtype.name]}Storage\n".encode()
    storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + _integer(view.storage.size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = storage + _integer(view.offset) + _tuple(view.shape) + _tuple(view.strides) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file with its tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, value in tensors.items():
        header[name] = {"dtype": SAFE[value.dtype.name], "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(v.tobytes() for v in tensors.values()))


def meta_config(cfg: ModelConfig) -> dict[str, Any]:
    """params.json; multiple_of and ffn_dim_multiplier are chosen so that Meta's rule gives cfg.mlp_dim."""
    multiplier = cfg.mlp_dim / mlp_dim_rule(cfg.embed_dim, 1, None)
    assert mlp_dim_rule(cfg.embed_dim, cfg.mlp_dim, multiplier) == cfg.mlp_dim
    params = dict(
        dim=cfg.embed_dim, n_layers=cfg.num_layers, n_heads=cfg.num_heads, n_kv_heads=cfg.num_kv_heads, vocab_size=-1,
        multiple_of=cfg.mlp_dim, ffn_dim_multiplier=multiplier, norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta,
    )  # fmt: skip
    if cfg.rope_type == "llama3":
        params |= dict(use_scaled_rope=True, rope_scaling_factor=cfg.rope_factor)
    return params


def write_meta(path: Path, cfg: ModelConfig, params: Params, shards: int = 1, embedding_axis: int = 1) -> None:
    """params.json and consolidated.NN.pth in `shards` files; needs head_dim = D / N.

    Args:
        path: the folder, made when missing.
        cfg: what the params are.
        params: our names and shapes; a tied head is written out, as Meta does.
        shards: model-parallel files; must divide the axes that are cut.
        embedding_axis: along which the embedding is cut: 1 for Llama 1 and 2, 0 for Llama 3.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / "params.json").write_text(json.dumps(meta_config(cfg)))
    ours = params | {"lm_head": params.get("lm_head", params["embedding"])}
    flat = to_flat(cfg, ours, META, interleave=True)
    cut = {theirs: CUT.get(leaf_of(name)) for name, theirs in names(cfg, META)} | {LM_HEAD[META]: 0}
    cut[EMBEDDING[META]] = embedding_axis
    for rank in range(shards):
        part = {
            name: value if cut[name] is None else np.split(value, shards, axis=cut[name])[rank] for name, value in flat.items()
        }
        part["rope.freqs"] = (cfg.rope_theta ** -np.linspace(0, 1, cfg.head_dim // 2)).astype(np.float32)
        write_torch(path / f"consolidated.{rank:02}.pth", part)


def huggingface_config(cfg: ModelConfig) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, keys as transformers 4 writes them."""
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=cfg.vocab_size,
        hidden_size=cfg.embed_dim, intermediate_size=cfg.mlp_dim, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, head_dim=cfg.head_dim,
        max_position_embeddings=cfg.max_length, rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_theta, rope_scaling=None,
        attention_bias=False, mlp_bias=False, tie_word_embeddings=cfg.tied_head,
    )  # fmt: skip
    if cfg.rope_type == "llama3":
        config["rope_scaling"] = dict(
            rope_type="llama3", factor=cfg.rope_factor, original_max_position_embeddings=cfg.rope_original_length,
            low_freq_factor=cfg.rope_low_freq_factor, high_freq_factor=cfg.rope_high_freq_factor,
        )  # fmt: skip
    elif cfg.rope_type != "default":
        config["rope_scaling"] = dict(rope_type=cfg.rope_type, factor=cfg.rope_factor)
    return config


def write_huggingface(
    path: Path, cfg: ModelConfig, params: Params, files: int = 1, tied: bool | None = None, suffix: str = ".safetensors"
) -> None:
    """config.json and model.safetensors, or `files` shards with an index; suffix ".bin" writes pytorch_model.bin instead.

    Args:
        path: the folder, made when missing.
        cfg: what the params are.
        params: our names and shapes; "lm_head" is written when it is there.
        files: weight files; 1 is written without an index.
        tied: tie_word_embeddings in config.json; cfg.tied_head unless given.
        suffix: ".safetensors" or ".bin".
    """
    path.mkdir(parents=True, exist_ok=True)
    config = huggingface_config(cfg) | ({} if tied is None else {"tie_word_embeddings": tied})
    (path / "config.json").write_text(json.dumps(config))
    flat = to_flat(cfg, params, HUGGING_FACE, interleave=False)
    stem, write = ("model", write_safetensors) if suffix == ".safetensors" else ("pytorch_model", write_torch)
    if files == 1:
        write(path / f"{stem}{suffix}", flat)
        return
    weight_map = {}
    for i, part in enumerate(np.array_split(list(flat), files), start=1):
        name = f"{stem}-{i:05}-of-{files:05}{suffix}"
        write(path / name, {str(key): flat[str(key)] for key in part})
        weight_map |= {str(key): name for key in part}
    index = {"metadata": {"total_size": sum(v.nbytes for v in flat.values())}, "weight_map": weight_map}
    (path / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


LLAMA2C_ORDER = {
    0: "embedding attn_norm q_proj k_proj v_proj o_proj mlp_norm gate_proj down_proj up_proj final_norm rope lm_head",
    1: "attn_norm mlp_norm final_norm embedding q_proj k_proj v_proj o_proj gate_proj down_proj up_proj lm_head",
    2: "attn_norm mlp_norm final_norm embedding q_proj k_proj v_proj o_proj gate_proj down_proj up_proj lm_head",
}


def write_llama2c(path: Path, cfg: ModelConfig, params: Params, version: int = 0, group: int = 64) -> Params:
    """A .bin of llama2.c; needs head_dim = D / N. Weights become float32, or int8 by groups (halved until one fits D).

    Returns:
        The params as a reader gives them back: float32, in version 2 the rounded values.
    """
    while cfg.embed_dim % group:
        group //= 2
    tied = "lm_head" not in params
    sizes = [cfg.embed_dim, cfg.mlp_dim, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads, cfg.vocab_size, cfg.max_length]
    if version == 0:
        out = [struct.pack("<7i", *sizes[:5], sizes[5] if tied else -sizes[5], sizes[6])]
    else:
        head = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, tied) + (struct.pack("<i", group) if version == 2 else b"")
        out = [head.ljust(256, b"\0")]
    kept: Params = {name: value.astype(np.float32) for name, value in params.items()}
    for leaf in LLAMA2C_ORDER[version].split():
        if leaf == "rope":
            out.append(np.zeros(cfg.max_length * cfg.head_dim, np.float32).tobytes())
        for name in [name for name in params if leaf_of(name) == leaf]:
            if version == 2 and not leaf.endswith("norm"):
                flat = to_flat(cfg, {name: kept[name]}, META, interleave=True).popitem()[1]
                values, scales = quantise(flat, group)
                out += [values.tobytes(), scales.tobytes()]
                rounded = (values.astype(np.float32) * scales[:, None]).reshape(flat.shape)
                kept[name] = _ours(cfg, leaf, rounded)
            else:
                out.append(to_flat(cfg, {name: kept[name]}, META, interleave=True).popitem()[1].tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(out))
    return kept


def quantise(flat: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 in groups of consecutive values: [n / group, group] int8 and [n / group] float32 scales."""
    groups = flat.astype(np.float32).reshape(-1, group)
    scales = np.abs(groups).max(1) / np.float32(127)
    return np.round(groups / scales[:, None]).astype(np.int8), scales


def _ours(cfg: ModelConfig, leaf: str, flat: np.ndarray) -> np.ndarray:
    """The inverse of to_flat for one Meta tensor, as plain NumPy."""
    shape = shapes(cfg)[leaf]
    if leaf in ("q_proj", "k_proj"):
        n, h, d = shape
        flat = flat.reshape(n, h // 2, 2, d).swapaxes(1, 2)
    return np.ascontiguousarray(flat).reshape(shape)
