"""One test per thing that can be wrong with a checkpoint: its exit code, and a message that says what to do."""

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llama_jax.checkpoint.source import open_source
from llama_jax.errors import ExitCode, LlamaError
from tests.checkpoint.make import (
    LFS_POINTER,
    View,
    as_view,
    meta_tiny,
    random_params,
    state_dict_pickle,
    to_flat,
    write_archive,
    write_huggingface,
    write_llama2c,
    write_meta,
    write_safetensors,
    write_torch,
)

CFG = meta_tiny()
PARAMS = random_params(CFG)
META_FLAT = to_flat(CFG, PARAMS, 0, interleave=True)
HF_FLAT = to_flat(CFG, PARAMS, 1, interleave=False)


def refused(path: Path, code: ExitCode, match: str) -> None:
    with pytest.raises(LlamaError, match=match) as caught:
        open_source(path)
    assert caught.value.code == code, caught.value
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is there


def test_missing_path(tmp_path):
    refused(tmp_path / "nowhere", ExitCode.NO_WEIGHTS, "nowhere does not exist: give a folder with model.safetensors")


def test_empty_folder_says_what_was_looked_for(tmp_path):
    refused(
        tmp_path, ExitCode.NO_WEIGHTS, r"looked for model.safetensors .* consolidated.\*.pth with params.json, or a .bin file"
    )


def test_weights_one_folder_down(tmp_path):
    write_meta(tmp_path / "original", CFG, PARAMS)
    refused(tmp_path, ExitCode.NO_WEIGHTS, "original holds some: give that folder")


def test_one_file_of_a_checkpoint(tmp_path):
    write_meta(tmp_path / "m", CFG, PARAMS)
    refused(tmp_path / "m/consolidated.00.pth", ExitCode.NO_WEIGHTS, f"give its folder, {tmp_path / 'm'}")


def test_several_llama2c_models(tmp_path):
    write_llama2c(tmp_path / "a.bin", CFG, PARAMS)
    write_llama2c(tmp_path / "b.bin", CFG, PARAMS)
    refused(tmp_path, ExitCode.NO_WEIGHTS, r"several models \(a.bin, b.bin\): give one of the files")


def test_folder_in_the_place_of_a_file(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    (tmp_path / "consolidated.00.pth").unlink()
    (tmp_path / "consolidated.00.pth").mkdir()
    refused(tmp_path, ExitCode.NO_WEIGHTS, "consolidated.00.pth cannot be read: Is a directory")


@pytest.mark.parametrize(
    "name",
    ["h/model.safetensors", "h/config.json", "h/tokenizer.json", "m/consolidated.00.pth", "m/params.json", "m/tokenizer.model"],
)
def test_git_lfs_pointer(tmp_path, name):
    write_huggingface(tmp_path / "h", CFG, PARAMS)
    write_meta(tmp_path / "m", CFG, PARAMS)
    (tmp_path / name).write_bytes(LFS_POINTER)
    refused(
        (tmp_path / name).parent, ExitCode.LFS_POINTER, f"{name} is a git-lfs pointer, not the file itself: run `git lfs pull`"
    )


def test_git_lfs_pointer_given_as_file(tmp_path):
    (tmp_path / "model.bin").write_bytes(LFS_POINTER)
    refused(tmp_path / "model.bin", ExitCode.LFS_POINTER, "git lfs pull")
    refused(tmp_path, ExitCode.LFS_POINTER, "git lfs pull")


# --- Meta: shards, shapes, names


def test_gap_in_the_numbers(tmp_path):
    write_meta(tmp_path, CFG, PARAMS, 4)
    (tmp_path / "consolidated.02.pth").unlink()
    refused(
        tmp_path, ExitCode.MISSING_SHARD, "has consolidated.03.pth and lacks consolidated.02.pth: download the missing file"
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_last_shard_missing(tmp_path, axis):
    write_meta(tmp_path, CFG, PARAMS, 2, axis)
    (tmp_path / "consolidated.01.pth").unlink()
    refused(tmp_path, ExitCode.MISSING_SHARD, "has 24 of 48 rows, so the model was cut into 2 files, and .* has 1: download")


def test_shard_too_many(tmp_path):
    write_meta(tmp_path, CFG, PARAMS, 2)
    (tmp_path / "consolidated.02.pth").write_bytes((tmp_path / "consolidated.01.pth").read_bytes())
    refused(tmp_path, ExitCode.EXTRA_SHARD, "cut into 2 files, and .* has 3: remove")


@pytest.mark.parametrize("name", ["consolidated.pth", "consolidated.0.pth"])
def test_shard_under_two_names(tmp_path, name):
    write_meta(tmp_path, CFG, PARAMS)
    (tmp_path / name).write_bytes((tmp_path / "consolidated.00.pth").read_bytes())
    refused(tmp_path, ExitCode.EXTRA_SHARD, "remove")


def test_shards_of_two_models(tmp_path):
    write_meta(tmp_path, CFG, PARAMS, 2)
    write_meta(tmp_path / "other", CFG, random_params(CFG, 1), 2)
    (tmp_path / "other/consolidated.01.pth").rename(tmp_path / "consolidated.01.pth")
    refused(tmp_path, ExitCode.WRONG_SHAPE, r"01.pth: layers.0.attention_norm.weight differs from that in consolidated.00.pth")


def test_shards_of_two_dtypes(tmp_path):
    write_meta(tmp_path, CFG, PARAMS, 2)
    write_meta(tmp_path / "other", CFG, random_params(CFG, 0, ml_dtypes.bfloat16), 2)
    (tmp_path / "other/consolidated.01.pth").rename(tmp_path / "consolidated.01.pth")
    refused(tmp_path, ExitCode.WRONG_SHAPE, "is bfloat16, in consolidated.00.pth it is float32")


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("layers.1.attention.wk.weight", (48, 48), r"wk.weight has shape \[48, 48\], expected \[16, 48\]"),
        ("layers.1.attention_norm.weight", (1, 48), r"attention_norm.weight has shape \[1, 48\], expected \[48\]"),
        ("layers.0.feed_forward.w1.weight", (81, 48), "give a feed-forward width of 80, the weights .* have 81"),
        ("norm.weight", (48, 1), r"norm.weight has shape \[48, 1\], expected 1 axes"),
    ],
)
def test_meta_shapes(tmp_path, name, shape, match):
    write_meta(tmp_path, CFG, PARAMS)
    write_torch(tmp_path / "consolidated.00.pth", META_FLAT | {name: np.zeros(shape, np.float32)})
    refused(tmp_path, ExitCode.WRONG_SHAPE, match)


def test_int8_weights(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    write_torch(tmp_path / "consolidated.00.pth", META_FLAT | {"norm.weight": np.zeros(48, np.int8)})
    refused(tmp_path, ExitCode.WRONG_SHAPE, "norm.weight' is int8, expected float16, bfloat16, float32 or float64: quantised")


@pytest.mark.parametrize("name", ["output.weight", "layers.1.ffn_norm.weight", "norm.weight"])
def test_meta_tensor_missing(tmp_path, name):
    write_meta(tmp_path, CFG, PARAMS)
    write_torch(tmp_path / "consolidated.00.pth", {k: v for k, v in META_FLAT.items() if k != name})
    refused(tmp_path, ExitCode.MISSING_TENSOR, f"consolidated.00.pth lacks '?{name}")


def test_meta_tensor_unknown(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    write_torch(tmp_path / "consolidated.00.pth", META_FLAT | {"layers.0.attention.wq.lora_a": np.zeros((1, 1), np.float32)})
    refused(tmp_path, ExitCode.UNKNOWN_TENSOR, "holds 'layers.0.attention.wq.lora_a', which a model of 2 layers does not have")


def test_absurd_number_of_layers(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    edit_json(tmp_path / "params.json", n_layers=10**11)
    refused(
        tmp_path,
        ExitCode.MISSING_TENSOR,
        "lacks 'layers.2.attention_norm.weight', .* and others, which a model of 100000000000 layers has",
    )


def test_params_json_missing(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    (tmp_path / "params.json").unlink()
    refused(tmp_path, ExitCode.BAD_CONFIG, "has consolidated.00.pth and no params.json: download it")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"params.json is not valid JSON"),
        ("[1]", "params.json holds list, expected a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"dim": 1, "dim": 2}', "the key 'dim' occurs twice"),
        ('{"model": 3}', '"model" is 3, expected an object'),
        ('{"dim": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"dim": "48"}', "^[^:]*: params.json lacks n_layers"),
    ],
)
def test_params_json_damaged(tmp_path, text, match):
    write_meta(tmp_path, CFG, PARAMS)
    (tmp_path / "params.json").write_text(text)
    refused(tmp_path, ExitCode.BAD_CONFIG, match)


def test_params_json_with_values_of_the_wrong_kind(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    edit_json(tmp_path / "params.json", use_scaled_rope=True, rope_scaling_factor="eight")
    refused(tmp_path, ExitCode.BAD_CONFIG, "rope_scaling_factor is 'eight', expected a number")


# --- torch files


def put_archive(path: Path, pickle: bytes, **entries: bytes) -> None:
    write_meta(path, CFG, PARAMS)
    write_archive(path / "consolidated.00.pth", {"data.pkl": pickle, "data/0": bytes(64)} | entries)


@pytest.mark.parametrize(
    ("pickle", "name"),
    [
        (b"\x80\2cos\nsystem\n(X\2\0\0\0lstR.", "os.system"),
        (b"\x80\2cbuiltins\neval\nX\1\0\0\x001\x85R.", "builtins.eval"),
        (b"\x80\4\x8c\x02os\x8c\6system\x93\x8c\2ls\x85R.", "os.system"),
        (b"\x80\2(X\2\0\0\0lsios\nsystem\n.", "INST"),
        (b"\x80\2}X\1\0\0\0acargparse\nNamespace\n)\x81s.", "argparse.Namespace"),
        (b"\x80\2ctorch\nload\n.", "torch.load"),
        (b"\x80\2ctorch._utils\n_rebuild_tensor_v3\n.", "_rebuild_tensor_v3"),
        (b"\x80\2ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\2ccollections\nOrderedDict\n}b.", "sets attributes"),
        (b"\x80\2ccollections\nOrderedDict\nK\1\x85R.", "collections.OrderedDict' with unusual arguments"),
    ],
)
def test_pickle_that_calls(tmp_path, pickle, name):
    put_archive(tmp_path, pickle)
    refused(tmp_path, ExitCode.UNSAFE_PICKLE, f"{name}.*it is refused")


@pytest.mark.parametrize(
    "pickle",
    [
        b"",
        b"\x80\2",
        b"\x80\2}",
        b".",
        b"\x80\2R.",
        b"\x80\2X\xff\xff\xff\xffab.",
        b"\x80\2r\xff\xff\xff\xff.",
        b"\x80\2h\5.",
        b"\x80\2B.",
    ],
)
def test_pickle_damaged(tmp_path, pickle):
    put_archive(tmp_path, pickle)
    refused(tmp_path, ExitCode.BAD_HEADER, r"data.pkl is damaged near byte \d+ of \d+: download the file again")


def test_pickle_of_something_else(tmp_path):
    put_archive(tmp_path / "a", b"\x80\2]q\0h\0a.")  # a list that holds itself
    refused(tmp_path / "a", ExitCode.BAD_HEADER, "holds a list, expected a dict of tensors")
    put_archive(tmp_path / "b", b"\x80\2}X\5\0\0\0model}s.")
    refused(
        tmp_path / "b", ExitCode.UNKNOWN_TENSOR, "holds another dict under 'model', .* save the model's state_dict by itself"
    )


BIG = np.zeros(16, np.float32)


@pytest.mark.parametrize(
    "view",
    [
        View(BIG, 1, (4, 4), (4, 1)),
        View(BIG, 0, (4, 4), (5, 1)),
        View(BIG, 15, (4, 4), (-4, -1)),
        View(BIG, -1, (4, 4), (4, 1)),
        View(BIG, 0, (2**31, 2**31), (0, 0)),
        View(BIG, 0, (2**40, 2**40, 2**40), (1, 1, 1)),
        View(BIG, 0, (1,) * 70, (1,) * 70),
        View(BIG, 2**60, (1,), (1,)),
        View(BIG, 0, (4, 4), (4,)),
    ],
)
def test_tensor_outside_its_storage(tmp_path, view):
    put_archive(tmp_path, state_dict_pickle({"norm.weight": ("0", view)}))
    refused(tmp_path, ExitCode.BAD_OFFSET, "describes a tensor .* in a storage of 16 values, which it does not fit")


def test_storage_larger_than_its_entry(tmp_path):
    put_archive(tmp_path, state_dict_pickle({"norm.weight": ("0", as_view(np.zeros(17, np.float32)))}))
    refused(tmp_path, ExitCode.BAD_OFFSET, "lies in 17 values of 4 bytes, the entry data/'0' has only 64 bytes")


def test_storage_missing(tmp_path):
    put_archive(tmp_path, state_dict_pickle({"norm.weight": ("7", as_view(BIG))}))
    refused(tmp_path, ExitCode.BAD_OFFSET, "lies in data/'7', which the archive lacks")


def test_big_endian(tmp_path):
    put_archive(tmp_path, b"", byteorder=b"big")
    refused(tmp_path, ExitCode.BAD_HEADER, "big-endian machine")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a\\b", "C:x"])
def test_zip_slip(tmp_path, name):
    write_meta(tmp_path, CFG, PARAMS)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "a") as archive:
        archive.writestr(name, b"x")
    refused(tmp_path, ExitCode.UNSAFE_NAME, "which points outside it: do not use it")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_entries(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "a") as archive:
        archive.writestr("consolidated.00/data/0", b"x")
    refused(tmp_path, ExitCode.BAD_HEADER, "two entries called 'consolidated.00/data/0'")


def test_two_pickles(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "a") as archive:
        archive.writestr("b/data.pkl", b"x")
    refused(tmp_path, ExitCode.BAD_HEADER, "2 entries called data.pkl, expected one")


def test_compressed_entries(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    with zipfile.ZipFile(tmp_path / "consolidated.00.pth", "a") as archive:
        archive.writestr("consolidated.00/data/99", bytes(1000), zipfile.ZIP_DEFLATED)
    refused(tmp_path, ExitCode.BAD_HEADER, r"compressed or encrypted \(method 8\).*pack the archive again without compression")


def test_old_torch(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    (tmp_path / "consolidated.00.pth").write_bytes(
        bytes.fromhex("80028a0a6cfc9c46f9206aa85019") + b".\x80\2M\xe9\3." + bytes(99)
    )
    refused(tmp_path, ExitCode.OLD_TORCH, "format from before version 1.6")
    (tmp_path / "old.bin").write_bytes((tmp_path / "consolidated.00.pth").read_bytes())
    refused(tmp_path / "old.bin", ExitCode.NO_WEIGHTS, "give its folder")


def test_not_a_torch_file(tmp_path):
    write_meta(tmp_path, CFG, PARAMS)
    (tmp_path / "consolidated.00.pth").write_bytes(b"<!DOCTYPE html>" * 10)
    refused(tmp_path, ExitCode.BAD_HEADER, "begins with b'<!DO', expected b'PK")


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -1, -30])
def test_torch_file_cut_short(tmp_path, kept):
    write_meta(tmp_path, CFG, PARAMS)
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:kept])
    code = ExitCode.BAD_HEADER if kept == 3 else ExitCode.TRUNCATED
    refused(
        tmp_path, code, "begins with" if kept == 3 else "is empty: download it again|the download is incomplete, get it again"
    )


def patch_zip(path: Path, find: bytes, offset: int, value: bytes) -> None:
    """Overwrites bytes at `offset` after the last occurrence of a signature."""
    data = bytearray(path.read_bytes())
    at = data.rindex(find) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("find", "offset", "value", "code", "match"),
    [
        (b"PK\1\2", 42, b"\xff\xff\xff\x7f", ExitCode.BAD_OFFSET, "is said to begin at 2147483647, where none does"),
        (b"PK\1\2", 20, b"\xff\xff\xff\x7f" * 2, ExitCode.BAD_OFFSET, "is said to be bytes"),
        (b"PK\1\2", 46, b"X", ExitCode.BAD_HEADER, "has another name where its data begins"),
        (b"PK\1\2", 0, b"XX", ExitCode.BAD_HEADER, "the zip directory is damaged at byte"),
        (b"PK\1\2", 28, b"\xff\xff", ExitCode.BAD_HEADER, "the zip directory is damaged at byte"),
        (b"PK\5\6", 16, b"\xff\xff\xff\x7f", ExitCode.BAD_OFFSET, "does not fit before"),
        (b"PK\5\6", 10, b"\xff\xff", ExitCode.BAD_OFFSET, "65535 entries"),
        (b"PK\5\6", 10, b"\x1b\0", ExitCode.BAD_HEADER, "names 27 entries and holds"),
    ],
)
def test_zip_directory(tmp_path, find, offset, value, code, match):
    write_meta(tmp_path, CFG, PARAMS)
    patch_zip(tmp_path / "consolidated.00.pth", find, offset, value)
    refused(tmp_path, code, match)


# --- safetensors


def put_header(path: Path, header: bytes, data: bytes = bytes(64)) -> None:
    write_huggingface(path, CFG, PARAMS)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(**changes: object) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} | changes}).encode()


@pytest.mark.parametrize(
    ("header", "code", "match"),
    [
        (b"{", ExitCode.BAD_HEADER, "is not valid JSON"),
        (b"\xff\xfe", ExitCode.BAD_HEADER, "is not valid JSON"),
        (b'{"x": {}, "x": {}}', ExitCode.BAD_HEADER, "the key 'x' occurs twice"),
        (b'{"x": 3}', ExitCode.BAD_HEADER, "has dtype None, expected one of"),
        (entry(dtype="F4"), ExitCode.BAD_HEADER, "has dtype 'F4', expected one of BOOL"),
        (entry(dtype=["F32"]), ExitCode.BAD_HEADER, "has dtype list value"),
        (entry(shape=[-16]), ExitCode.BAD_HEADER, r"has shape \[-16\], expected a list"),
        (entry(shape=[True]), ExitCode.BAD_HEADER, "expected a list"),
        (entry(shape=[2**62, 2**62]), ExitCode.BAD_HEADER, "expected a list"),
        (entry(shape=[2**40, 2**40]), ExitCode.BAD_OFFSET, "expected an integer above"),
        (entry(shape=[1] * 99), ExitCode.BAD_HEADER, "has shape list value"),
        (entry(data_offsets=[0]), ExitCode.BAD_HEADER, r"data_offsets \[0\], expected \[begin, end\]"),
        (entry(data_offsets=[64, 0]), ExitCode.BAD_HEADER, "expected .begin, end"),
        (entry(shape=[17]), ExitCode.BAD_OFFSET, "is said to lie in 64 bytes, expected 68"),
        (entry(data_offsets=[4, 68]), ExitCode.BAD_OFFSET, "begins at 4 of the data, the tensor before it ends at 0"),
        (entry(shape=[2**20], data_offsets=[0, 2**22]), ExitCode.TRUNCATED, "64 bytes of data, its header describes 4194304"),
        (entry(shape=[8], data_offsets=[0, 32]), ExitCode.BAD_OFFSET, "its header describes only 32"),
        (entry(shape=[0], data_offsets=[0, 0]), ExitCode.BAD_OFFSET, "its header describes only 0"),
    ],
)
def test_safetensors_header(tmp_path, header, code, match):
    put_header(tmp_path, header)
    refused(tmp_path, code, match)


@pytest.mark.parametrize("length", [73, 2**63, 2**64 - 1])
def test_safetensors_header_larger_than_file(tmp_path, length):
    put_header(tmp_path, b"")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + bytes(64))
    refused(tmp_path, ExitCode.BAD_HEADER, f"says that its header has {length} bytes, the file has 72")


@pytest.mark.parametrize(("kept", "code"), [(0, 23), (7, 23), (100, 20), (-1, 23), (-5000, 23)])
def test_safetensors_cut_short(tmp_path, kept, code):
    write_huggingface(tmp_path, CFG, PARAMS)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, ExitCode(code), "download it again")


# --- Hugging Face: config, index, names


def test_config_json_missing(tmp_path):
    write_huggingface(tmp_path, CFG, PARAMS)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, ExitCode.BAD_CONFIG, "has model.safetensors and no config.json: download it")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(model_type="mixtral"), "model_type='mixtral'"),
        (dict(layer_types=3), "config.json"),
        (dict(rms_norm_eps="small"), "rms_norm_eps is 'small', expected a number"),
        (dict(hidden_size=6 * 10**300, head_dim=None), "config.json: hidden_size is 60000.*, expected a number"),
        (dict(vocab_size=2**50), "vocab_size is 1125899906842624, expected a number"),
        (dict(max_position_embeddings="x"), "max_position_embeddings is 'x', expected a number"),
        (dict(num_key_value_heads=[1]), "num_key_value_heads is .1., expected a number"),
    ],
)
def test_config_json_values(tmp_path, changes, match):
    write_huggingface(tmp_path, CFG, PARAMS)
    edit_json(tmp_path / "config.json", **changes)
    refused(tmp_path, ExitCode.BAD_CONFIG, match)


def test_huggingface_shapes(tmp_path):
    write_huggingface(tmp_path, CFG, PARAMS)
    edit_json(tmp_path / "config.json", vocab_size=41)
    refused(tmp_path, ExitCode.WRONG_SHAPE, r"model.embed_tokens.weight has shape \[40, 48\], the config asks for \[41, 48\]")


def test_huggingface_tensor_missing_or_unknown(tmp_path):
    write_huggingface(tmp_path, CFG, PARAMS)
    write_safetensors(tmp_path / "model.safetensors", {k: v for k, v in HF_FLAT.items() if "layers.1.mlp" not in k})
    refused(tmp_path, ExitCode.MISSING_TENSOR, "lacks 'model.layers.1.mlp.gate_proj.weight', .*which a model of 2 layers has")
    write_safetensors(
        tmp_path / "model.safetensors", HF_FLAT | {"model.layers.0.self_attn.q_proj.bias": np.zeros(48, np.float32)}
    )
    refused(tmp_path, ExitCode.UNKNOWN_TENSOR, "holds 'model.layers.0.self_attn.q_proj.bias'")
    write_safetensors(tmp_path / "model.safetensors", {k.removeprefix("model."): v for k, v in HF_FLAT.items()})
    refused(tmp_path, ExitCode.MISSING_TENSOR, "it holds 'embed_tokens.weight', .*which no Llama has")


def test_head_missing(tmp_path):
    tied = meta_tiny(tied_head=True)
    write_huggingface(tmp_path, tied, random_params(tied), tied=False)
    refused(tmp_path, ExitCode.MISSING_TENSOR, "lacks 'lm_head.weight'")


def test_tied_with_another_head(tmp_path):
    write_huggingface(tmp_path, CFG, PARAMS, tied=True)
    refused(
        tmp_path, ExitCode.BAD_CONFIG, "says tie_word_embeddings, and lm_head.weight differs from model.embed_tokens.weight"
    )


def rename_in_index(folder: Path, new: Callable[[str], str]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {tensor: new(name) for tensor, name in index["weight_map"].items()}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", "a\\b", "C:x"])
def test_index_leaves_the_folder(tmp_path, name):
    write_huggingface(tmp_path, CFG, PARAMS, 2)
    rename_in_index(tmp_path, lambda _: name)
    refused(tmp_path, ExitCode.UNSAFE_NAME, "expected the name of a file in the same folder")


def test_index_damaged(tmp_path):
    write_huggingface(tmp_path, CFG, PARAMS, 2)
    path = tmp_path / "model.safetensors.index.json"
    for text, match in (
        ("{", "not valid JSON"),
        ('{"weight_map": []}', "expected an object"),
        ('{"weight_map": {}}', "names no tensor"),
    ):
        path.write_text(text)
        refused(tmp_path, ExitCode.BAD_CONFIG, match)
    path.write_text('{"weight_map": {"x": 3}}')
    refused(tmp_path, ExitCode.BAD_CONFIG, "'x' lies in 3, expected the name of a file")


@pytest.mark.parametrize("index", [True, False])
def test_shard_file_missing(tmp_path, index):
    write_huggingface(tmp_path, CFG, PARAMS, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, ExitCode.MISSING_SHARD, "model-00002-of-00003.safetensors.*download")


def test_index_names_too_few(tmp_path):
    write_huggingface(tmp_path, CFG, PARAMS, 3)
    rename_in_index(tmp_path, lambda name: name.replace("00003-of", "00002-of"))
    refused(tmp_path, ExitCode.MISSING_SHARD, "names 2 of 3 files, not model-00003-of-00003.safetensors")


@pytest.mark.parametrize("name", ["model-00004-of-00003.safetensors", "model-00001-of-00002.safetensors", "model.safetensors"])
def test_file_that_the_index_does_not_name(tmp_path, name):
    write_huggingface(tmp_path, CFG, PARAMS, 3)
    write_safetensors(tmp_path / name, HF_FLAT)
    refused(tmp_path, ExitCode.EXTRA_SHARD, f"has '{name}', which model.safetensors.index.json does not name: remove")


def test_two_sets_without_index(tmp_path):
    write_huggingface(tmp_path, CFG, PARAMS, 2)
    (tmp_path / "model.safetensors.index.json").unlink()
    write_safetensors(tmp_path / "model.safetensors", HF_FLAT)
    refused(tmp_path, ExitCode.EXTRA_SHARD, "files of several sets .*: remove")


def test_index_and_files_disagree(tmp_path):
    write_huggingface(tmp_path, CFG, PARAMS, 2)
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    data = first.read_bytes()
    write_safetensors(first, {"model.norm.weight": PARAMS["final_norm"]})
    refused(
        tmp_path,
        ExitCode.UNKNOWN_TENSOR,
        "holds 'model.norm.weight', but the index puts it in 'model-00002-of-00002.safetensors'",
    )
    write_safetensors(first, {"x": PARAMS["final_norm"]})
    refused(tmp_path, ExitCode.UNKNOWN_TENSOR, "holds 'x', but the index does not name it")
    write_safetensors(first, {})
    refused(tmp_path, ExitCode.MISSING_TENSOR, "lacks 'model.embed_tokens.weight', which the index puts there")
    first.write_bytes(data)
    (tmp_path / "model.safetensors.index.json").unlink()
    second.write_bytes(data)
    refused(tmp_path, ExitCode.UNKNOWN_TENSOR, "holds 'model.embed_tokens.weight', which an earlier file has")


# --- llama2.c


def patch(path: Path, at: int, form: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    path.write_bytes(data)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_llama2c_cut_short_or_too_long(tmp_path, version):
    path = tmp_path / "m.bin"
    write_llama2c(path, CFG, PARAMS, version)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    refused(path, ExitCode.TRUNCATED, f"has {len(data) - 1} bytes, its header .* describes {len(data)}: download it again")
    path.write_bytes(data + b"\0")
    refused(path, ExitCode.BAD_HEADER, f"has {len(data) + 1} bytes")
    path.write_bytes(data[:20])
    refused(path, ExitCode.BAD_HEADER, "describes no model")
    path.write_bytes(b"")
    refused(path, ExitCode.TRUNCATED, "is empty")


@pytest.mark.parametrize(
    ("version", "at", "value", "match"),
    [
        (0, 0, -48, "describes no model"),
        (0, 4, 2**31 - 1, "its header .version 0. describes"),
        (0, 8, 2**31 - 1, "its header .version 0. describes"),
        (0, 12, 7, "describes no model"),
        (0, 16, 4, "describes no model"),
        (1, 4, 9, "is version 9 of llama2.c's format"),
        (2, 37, 0, "is version 2 .* groups of 0; versions 0, 1 and 2 are read"),
        (2, 37, -16, "groups of -16"),
        (2, 37, 7, "does not divide into groups of 7"),
    ],
)
def test_llama2c_header(tmp_path, version, at, value, match):
    write_llama2c(tmp_path / "m.bin", CFG, PARAMS, version)
    patch(tmp_path / "m.bin", at, "<i", value)
    code = ExitCode.TRUNCATED if "its header" in match else ExitCode.BAD_HEADER
    refused(tmp_path / "m.bin", code, match)
