"""Every format gives back the weights that were written, byte for byte, under our names."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llama_jax.checkpoint.source import Source, open_source
from tests.checkpoint.make import (
    View,
    as_view,
    meta_tiny,
    random_params,
    to_flat,
    write_archive,
    write_huggingface,
    write_llama2c,
    write_meta,
    write_torch,
)

STORIES = Path(__file__).resolve().parents[2].parent / "shared/checkpoints/stories260K"
CFG = meta_tiny()
WIDE = meta_tiny(head_dim=10)  # heads wider than D / N: only Hugging Face can say it


def assert_holds(source: Source, params: dict[str, np.ndarray]) -> None:
    assert list(source.params) == list(params)
    for name, value in params.items():
        array = source.params[name]
        assert (array.shape, array.dtype, array.nbytes) == (value.shape, value.dtype, value.nbytes), name
        assert array.read().tobytes() == value.tobytes(), name
        index = tuple(slice(n // 3, n // 3 + (n + 1) // 2) for n in value.shape)
        assert array.read(index).tobytes() == value[index].tobytes(), name


@pytest.mark.parametrize(("shards", "axis"), [(1, 1), (2, 1), (2, 0), (4, 1), (4, 0)])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_meta_shards_merge(tmp_path, shards, axis, dtype):
    """4 shards of 2 kv heads: each holds half a head."""
    params = random_params(CFG, 1, dtype)
    write_meta(tmp_path / "m", CFG, params, shards, axis)
    source = open_source(tmp_path / "m", max_length=CFG.max_length)
    assert (source.kind, source.config, source.dtype) == ("Meta", CFG, np.dtype(dtype))
    assert_holds(source, params)
    flat = to_flat(CFG, params, 0, interleave=True)
    assert source.raw.keys() == flat.keys()
    assert all(source.raw[name].read().tobytes() == value.tobytes() for name, value in flat.items())
    assert {p.name for p in source.files} == {"params.json"} | {f"consolidated.{i:02}.pth" for i in range(shards)}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("files", [1, 3])
def test_huggingface_files_merge(tmp_path, files, suffix):
    params = random_params(WIDE, 2, ml_dtypes.bfloat16)
    write_huggingface(tmp_path, WIDE, params, files, suffix=suffix)
    source = open_source(tmp_path)
    assert (source.kind, source.config, source.notes) == ("Hugging Face", WIDE, ())
    assert_holds(source, params)
    assert set(source.files) == set(tmp_path.iterdir())


def test_shards_without_index_are_enough(tmp_path):
    params = random_params(WIDE)
    write_huggingface(tmp_path, WIDE, params, 2)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_holds(open_source(tmp_path), params)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_versions(tmp_path, version, tied):
    cfg = meta_tiny(tied_head=tied)
    params = write_llama2c(tmp_path / "m.bin", cfg, random_params(cfg, 3), version)
    source = open_source(tmp_path / "m.bin")
    assert (source.kind, source.config, source.dtype) == ("llama2.c", cfg, np.dtype(np.float32))
    assert_holds(source, params)
    assert open_source(tmp_path).path == tmp_path / "m.bin"  # the folder works too


def test_all_formats_agree(tmp_path):
    params = random_params(CFG, 4)
    write_meta(tmp_path / "m", CFG, params, 2)
    write_huggingface(tmp_path / "h", CFG, params, 2)
    write_llama2c(tmp_path / "c.bin", CFG, params)
    sources = [open_source(tmp_path / name, max_length=64) for name in ("m", "h", "c.bin")]
    assert len({source.config for source in sources}) == 1
    for source in sources:
        assert_holds(source, params)


@pytest.mark.parametrize("kind", ["meta", "huggingface", "bin"])
def test_equal_head_is_tied(tmp_path, kind):
    cfg = meta_tiny(tied_head=True)
    params = random_params(cfg)
    both = params | {"lm_head": params["embedding"]}
    if kind == "meta":
        write_meta(tmp_path, cfg, both, 2, 0)
    else:
        write_huggingface(tmp_path, cfg, both, tied=False, suffix=".safetensors" if kind == "huggingface" else ".bin")
    source = open_source(tmp_path, max_length=64)
    assert source.config == cfg
    assert_holds(source, params)


@pytest.mark.parametrize("present", [False, True])
def test_tied_by_config(tmp_path, present):
    cfg = meta_tiny(tied_head=True)
    params = random_params(cfg)
    write_huggingface(tmp_path, cfg, params | ({"lm_head": params["embedding"]} if present else {}))
    assert_holds(open_source(tmp_path), params)


def test_strides_and_shared_storage(tmp_path):
    """Tensors saved as transposed views, and all in one storage."""
    params = random_params(CFG, 5)
    write_meta(tmp_path, CFG, params)
    flat = to_flat(CFG, params, 0, interleave=True)
    storage = np.concatenate([value.T.reshape(-1) for value in flat.values()])
    views, at = {}, 0
    for name, value in flat.items():
        views[name] = View(storage, at, value.shape, (1, value.shape[0]) if value.ndim == 2 else (1,))
        at += value.size
    write_torch(tmp_path / "consolidated.00.pth", views)
    assert_holds(open_source(tmp_path), params)


def test_mixed_dtypes_keep_theirs(tmp_path):
    params = random_params(CFG, 6, ml_dtypes.bfloat16)
    params["final_norm"] = params["final_norm"].astype(np.float32)
    write_huggingface(tmp_path, CFG, params)
    source = open_source(tmp_path)
    assert source.dtype == np.float32
    assert_holds(source, params)
    assert source.params["embedding"].dtype == ml_dtypes.bfloat16


def test_old_inv_freq_is_ignored(tmp_path):
    params = random_params(CFG)
    write_huggingface(tmp_path, CFG, params, suffix=".bin")
    flat = to_flat(CFG, params, 1, interleave=False)
    flat["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_torch(tmp_path / "pytorch_model.bin", flat)
    assert_holds(open_source(tmp_path), params)


def test_state_dicts_as_modules_save_them(tmp_path):
    """An OrderedDict with _metadata, parameters instead of tensors, memo instructions, framing of protocol 4."""
    params = random_params(CFG)
    write_huggingface(tmp_path, CFG, params, suffix=".bin")
    flat = to_flat(CFG, params, 1, interleave=False)
    items = b""
    for i, (name, value) in enumerate(flat.items()):
        storage = b"(X\7\0\0\0storagectorch\nFloatStorage\n\x8c" + bytes([len(str(i))]) + str(i).encode()
        storage += b"\x8c\3cpuJ" + value.size.to_bytes(4, "little") + b"tQ"
        shape = b"".join(b"M" + n.to_bytes(2, "little") for n in value.shape) + (b"\x86" if value.ndim == 2 else b"\x85")
        strides = b"".join(b"M" + n.to_bytes(2, "little") for n in as_view(value).strides)
        strides += b"\x86" if value.ndim == 2 else b"\x85"
        hooks = b"ccollections\nOrderedDict\n)R"
        tensor = (
            b"\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93("
            + storage
            + b"K\0"
            + shape
            + strides
            + b"\x89"
            + hooks
            + b"tR"
        )
        parameter = b"ctorch._utils\n_rebuild_parameter\n\x94(" + tensor + b"\x88" + hooks + b"tR"
        items += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x94" + parameter
    metadata = b"}\x8c\x09_metadataccollections\nOrderedDict\n)R\x8c\0}\x8c\7versionK\1sssb"
    pickle = b"\x80\4\x95" + bytes(8) + b"ccollections\nOrderedDict\n)Rq\0(" + items + b"u" + metadata + b"."
    blobs = {f"data/{i}": value.tobytes() for i, value in enumerate(flat.values())}
    write_archive(tmp_path / "pytorch_model.bin", {"data.pkl": pickle, **blobs}, root="archive")
    assert_holds(open_source(tmp_path), params)


def to_zip64(path: Path) -> None:
    """Moves offsets and sizes of a zip's directory to 64-bit fields, as in archives above 4 GiB (APPNOTE.TXT 4.3.14-16)."""
    data = path.read_bytes()
    at = data.rindex(b"PK\5\6")
    count, _, begin = struct.unpack_from("<HII", data, at + 10)
    directory, position = b"", begin
    for _ in range(count):
        fields = list(struct.unpack_from("<4s6H3I5H2I", data, position))
        name = data[position + 46 : position + 46 + fields[10]]
        position += 46 + sum(fields[10:13])
        extra = struct.pack("<HH3Q", 1, 24, fields[9], fields[8], fields[16])
        fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
        fields[11] = len(extra) + 4
        directory += struct.pack("<4s6H3I5H2I", *fields) + name + struct.pack("<HH", 0xCAFE, 0) + extra
    end = begin + len(directory)
    tail = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), begin)
    tail += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    tail += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:begin] + directory + tail)


def test_archives_above_4_gib(tmp_path):
    """The directory that a file of this size has; one of 4.8 GB by torch 2.13 was read by hand."""
    params = random_params(CFG)
    write_meta(tmp_path, CFG, params)
    to_zip64(tmp_path / "consolidated.00.pth")
    assert_holds(open_source(tmp_path), params)


def test_safetensors_are_preferred(tmp_path):
    params = random_params(CFG)
    write_huggingface(tmp_path, CFG, params)
    write_huggingface(tmp_path, CFG, random_params(CFG, 9), suffix=".bin")
    write_meta(tmp_path, CFG, random_params(CFG, 9))
    source = open_source(tmp_path)
    assert_holds(source, params)
    assert any("the safetensors are used" in note for note in source.notes)
    assert any("those of Hugging Face are used" in note for note in source.notes)
    assert {p.name for p in source.files} == {"model.safetensors", "config.json"}


def test_rope_scaling_and_length(tmp_path):
    cfg = meta_tiny(rope_type="llama3", rope_factor=8.0, rope_original_length=8192, rope_theta=5e5)
    write_huggingface(tmp_path / "h", cfg, random_params(cfg))
    write_meta(tmp_path / "m", cfg, random_params(cfg))
    assert open_source(tmp_path / "h").config == cfg
    assert open_source(tmp_path / "m", max_length=64).config == cfg
    assert any(note.startswith("warning: ") for note in open_source(tmp_path / "m").notes)
    assert open_source(tmp_path / "h", max_length=7).config.max_length == 7


def test_tokenizers_are_found(tmp_path):
    write_huggingface(tmp_path / "h", CFG, random_params(CFG))
    write_meta(tmp_path / "m", CFG, random_params(CFG))
    write_llama2c(tmp_path / "c/x.bin", CFG, random_params(CFG))
    for name in ("h/tokenizer.json", "h/tokenizer_config.json", "h/chat_template.jinja", "h/vocab.txt", "c/tokenizer.bin"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in open_source(tmp_path / "h").tokenizer] == [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    ]  # fmt: skip
    assert open_source(tmp_path / "m").tokenizer == ()
    (tmp_path / "tokenizer.model").write_text("above")
    assert open_source(tmp_path / "m").tokenizer == (tmp_path / "tokenizer.model",)
    (tmp_path / "m/tokenizer.model").write_text("beside")
    assert open_source(tmp_path / "m").tokenizer == (tmp_path / "m/tokenizer.model",)
    assert open_source(tmp_path / "c").tokenizer == (tmp_path / "c/tokenizer.bin",)


def test_params_under_a_model_key(tmp_path):
    params = random_params(CFG)
    write_meta(tmp_path, CFG, params, 2)
    stated = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps({"model": stated}))
    assert_holds(open_source(tmp_path, max_length=64), params)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the real checkpoint is not there: {STORIES}")
def test_real_checkpoint_is_the_same_in_both_formats():
    meta, llama2c = open_source(STORIES / "meta"), open_source(STORIES / "llama2c")
    assert meta.config.tied_head and llama2c.config.tied_head
    assert (meta.config.num_params, llama2c.config.max_length) == (llama2c.config.num_params, 512)
    assert list(meta.params) == list(llama2c.params) and "lm_head" not in meta.params
    for name, array in meta.params.items():
        assert array.read().tobytes() == llama2c.params[name].read().tobytes(), name
    assert [p.name for p in meta.tokenizer + llama2c.tokenizer] == ["tokenizer.model", "tokenizer.bin"]
