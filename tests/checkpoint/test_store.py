"""What lies on disk: the chunks arrays are cut into, what a partial read costs, and which directories are checkpoints."""

import dataclasses
import json
import math

import ml_dtypes
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.checkpoint.store import MANIFEST, MIN_CHUNK_BYTES, Checkpoint, chunk_shape, to_tree
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import param_axes
from tests.checkpoint.make import meta_tiny, random_params
from tests.checkpoint.test_save import save

AXES = {"vocab": 8, "embed": 8, "heads": 8, "kv_heads": 8, "mlp": 8, "head_dim": 1, "norm": 1}  # the most pieces of each


# --- chunk_shape


@pytest.mark.parametrize(
    ("shape", "axes", "itemsize", "expected"),
    [
        ((32000, 4096), ("vocab", "embed"), 2, (4000, 512)),
        ((128256, 4096), ("vocab", "embed"), 2, (16032, 512)),
        ((32016, 4096), ("vocab", "embed"), 2, (4002, 512)),  # Code Llama
        ((32, 128, 4096), ("heads", "head_dim", "embed"), 2, (4, 128, 512)),
        ((4096, 32, 128), ("embed", "heads", "head_dim"), 2, (512, 4, 128)),
        ((11008, 4096), ("mlp", "embed"), 2, (1376, 512)),
        ((4096, 11008), ("embed", "mlp"), 4, (512, 1376)),
        ((52, 128, 6656), ("heads", "head_dim", "embed"), 2, (13, 128, 832)),  # 33B: 52 heads divide by 4
        ((4096,), ("norm",), 4, (4096,)),
    ],
)
def test_weights_are_cut_into_eighths_where_eight_divides(shape, axes, itemsize, expected):
    assert chunk_shape(shape, axes, itemsize) == expected


def test_one_shared_kv_head_keeps_its_axis_whole():
    assert chunk_shape((1, 128, 16384), ("kv_heads", "head_dim", "embed"), 2) == (1, 128, 2048)


def test_small_arrays_stay_in_one_chunk():
    assert chunk_shape((320, 48), ("vocab", "embed"), 4) == (320, 48)


def test_embed_is_cut_less_before_the_sharded_axis():
    """1 MiB allows 4 chunks of 256 KiB: both axes lose pieces in turn, embed the first of equals."""
    assert chunk_shape((512, 512), ("mlp", "embed"), 4) == (256, 256)
    assert chunk_shape((256, 512), ("mlp", "embed"), 4) == (128, 512)
    assert chunk_shape((512, 256), ("embed", "mlp"), 4) == (512, 128)


@given(
    sizes=st.lists(st.tuples(st.sampled_from(sorted(AXES)), st.integers(1, 5000)), min_size=1, max_size=3),
    itemsize=st.sampled_from([2, 4, 8]),
)
def test_chunks_divide_the_array_and_none_is_under_256_kib_unless_it_is_the_whole(sizes, itemsize):
    axes, shape = zip(*sizes, strict=True)
    chunks = chunk_shape(shape, axes, itemsize)
    assert all(size % chunk == 0 for size, chunk in zip(shape, chunks, strict=True))
    pieces = [size // chunk for size, chunk in zip(shape, chunks, strict=True)]
    assert all(AXES[axis] % n == 0 for axis, n in zip(axes, pieces, strict=True))
    assert math.prod(chunks) * math.prod(pieces) == math.prod(shape)
    assert chunks == shape or math.prod(chunks) * itemsize >= MIN_CHUNK_BYTES


# --- what is read from disk


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A checkpoint with weights of [4096, 4096] bfloat16, 32 MiB in 8 x 8 chunks of 512 KiB."""
    cfg = meta_tiny(embed_dim=4096, mlp_dim=4096, num_heads=4, num_kv_heads=2, head_dim=16, num_layers=1, tied_head=True)
    params = random_params(cfg, dtype=ml_dtypes.bfloat16)
    return save(tmp_path_factory.mktemp("big") / "checkpoint", cfg, params), params


def file_bytes_read() -> int:
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return int(metric["values"][0]["value"])


def test_stored_chunks_are_those_of_chunk_shape(big):
    checkpoint, _ = big
    for name in ("gate_proj", "down_proj"):
        store = checkpoint.arrays().open(f"layers.0.{name}")
        assert store.chunk_layout.read_chunk.shape == (512, 512)
        assert store.spec().to_json()["metadata"]["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]


@pytest.mark.parametrize("leaf", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_eighth_of_an_array_reads_little_more_than_an_eighth_of_its_bytes(big, leaf, axis):
    checkpoint, params = big
    whole = params[f"layers.0.{leaf}"]
    index = tuple(slice(512, 1024) if i == axis else slice(0, 4096) for i in range(2))
    before = file_bytes_read()
    part = checkpoint.arrays().read(f"layers.0.{leaf}", index)
    read = file_bytes_read() - before
    assert part.tobytes() == whole[index].tobytes()
    assert whole.nbytes / 8 <= read <= 1.3 / 8 * whole.nbytes


def test_a_whole_array_is_read_once(big):
    checkpoint, params = big
    before = file_bytes_read()
    assert checkpoint.arrays().read("layers.0.up_proj").tobytes() == params["layers.0.up_proj"].tobytes()
    assert file_bytes_read() - before <= 1.05 * params["layers.0.up_proj"].nbytes


# --- which directory is a checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    cfg = meta_tiny(num_layers=1)
    return save(tmp_path_factory.mktemp("small") / "checkpoint", cfg, random_params(cfg))


def refused(path, match, code=ExitCode.NOT_A_CHECKPOINT):
    with pytest.raises(LlamaError, match=match) as caught:
        Checkpoint.open(path)
    assert caught.value.code == code


def copy_of(checkpoint, folder, **changes):
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(checkpoint.manifest() | changes))
    return folder


def test_opening_gives_back_what_was_saved(small):
    assert dataclasses.replace(Checkpoint.open(small.path), path=small.path) == small
    assert Checkpoint.open(str(small.path)).manifest() == small.manifest()


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist; python -m llama_jax.convert makes a checkpoint")
    (tmp_path / "params").mkdir()
    refused(tmp_path, "no complete llama_jax checkpoint .checkpoint.json is missing.*python -m llama_jax.convert --source")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": "of another program", "version": 1}'])
def test_a_manifest_of_another_program_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    refused(tmp_path, "checkpoint.json is not one that llama_jax wrote: convert the source again")


def test_a_later_version_is_refused(small, tmp_path):
    refused(copy_of(small, tmp_path / "c", version=3), "format version 3, this llama_jax reads versions 1 and 2: update it")


def test_a_working_directory_opens_its_newest_complete_step(small, tmp_path):
    for step in ("9", "10", "tmp"):
        copy_of(small, tmp_path / "checkpoints" / step, command=step)
    (tmp_path / "checkpoints" / "11").mkdir()
    assert Checkpoint.open(tmp_path).command == "10"


def test_a_missing_or_damaged_array_says_so(small, tmp_path):
    with pytest.raises(LlamaError, match=r"no readable array 'layers.7.q_proj'.*convert the source again") as caught:
        small.arrays().read("layers.7.q_proj")
    assert caught.value.code == ExitCode.TRUNCATED
    cfg = meta_tiny(num_layers=1)
    damaged = save(tmp_path / "damaged", cfg, random_params(cfg))
    for file in sorted((tmp_path / "damaged/params").rglob("*")):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(LlamaError) as caught:
        for name in random_params(cfg):
            damaged.arrays().read(name)
    assert caught.value.code == ExitCode.TRUNCATED


def test_dotted_names_become_a_tree():
    flat = {"layers.1.q_proj": 4, "embedding": 1, "layers.0.q_proj": 2, "layers.0.k_proj": 3}
    assert to_tree(flat) == {"embedding": 1, "layers": [{"q_proj": 2, "k_proj": 3}, {"q_proj": 4}]}


def test_every_parameter_has_an_axis_name_for_each_axis(small):
    axes = param_axes(small.config)
    assert {len(names) for names in axes["layers"][0].values()} == {1, 2, 3}
