"""LazyArray: whatever views are stacked on it, a read gives the bytes of the same operation in NumPy, and no more is read."""

import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint.files import MappedFile
from llama_jax.checkpoint.lazy import LazyArray, concatenate, equal, mapped, mapped_int8
from llama_jax.checkpoint.memory import ALIGNMENT


def on_disk(path: Path, value: np.ndarray, skip: int = 3) -> LazyArray:
    """The value after `skip` bytes; after 3 nothing is aligned."""
    path.write_bytes(b"\1" * skip + value.tobytes())
    return mapped(MappedFile(path), skip, value.shape, value.dtype)


def slices(data: st.DataObject, shape: tuple[int, ...]) -> tuple[slice, ...]:
    ends = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    return tuple(slice(*pair) for pair in ends)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8])
def test_reads_every_dtype_at_any_alignment(tmp_path, dtype):
    value = np.arange(24).reshape(2, 12).astype(dtype)
    array = on_disk(tmp_path / "x", value)
    assert array.read().dtype == value.dtype and array.read().tobytes() == value.tobytes()
    assert array.nbytes == value.nbytes


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_views_equal_numpy(tmp_path, data):
    """Shards cut anywhere, also inside a head; split into heads; RoPE halves; any part of it."""
    heads, half, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    size = 2 * half
    value = np.arange(heads * size * width, dtype=np.int32).reshape(heads * size, width).astype(np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, heads * size), max_size=3)))
    parts = np.split(value, cuts, axis=0)
    skip = data.draw(st.sampled_from([3, ALIGNMENT]))
    array = concatenate([on_disk(tmp_path / f"{i}.bin", part, skip) for i, part in enumerate(parts) if part.size], axis=0)
    array, value = array.split(0, size), value.reshape(heads, size, width)
    if data.draw(st.booleans()):
        array = array.rope_halves()
        value = value.reshape(heads, half, 2, width).swapaxes(1, 2).reshape(heads, size, width)
    index = slices(data, value.shape)
    assert array.shape == value.shape
    assert np.array_equal(array.read(), value)
    part = array.read(index)
    assert part.flags.c_contiguous and np.array_equal(part, value[index])
    view = array.view(index)
    assert view.dtype == value.dtype and view.flags.c_contiguous and np.array_equal(view, value[index])
    for path in tmp_path.glob("*.bin"):
        path.unlink()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.int8])
def test_jax_takes_a_view_without_a_copy(tmp_path, dtype):
    value = np.arange(6 * 64).reshape(6, 64).astype(dtype)
    array = on_disk(tmp_path / "x", value, ALIGNMENT).split(0, 3)
    for index in (None, (slice(1, 2), slice(0, 3), slice(0, 64))):
        view = array.view(index)
        expected = value.reshape(2, 3, 64)[index or ...]
        assert view.dtype == value.dtype and not view.flags.writeable and view.tobytes() == expected.tobytes()
        taken = jax.device_put(view, jax.devices()[0])
        assert taken.unsafe_buffer_pointer() == view.ctypes.data == array.boxes[0].view[0 if index is None else 1].ctypes.data


def test_what_is_not_as_asked_is_copied(tmp_path):
    """Bytes that are not aligned, rows that are cut, boxes that are joined, integers that are scaled."""
    value = np.arange(4 * 64, dtype=np.float32).reshape(4, 64)
    there = on_disk(tmp_path / "x", value, ALIGNMENT)
    (tmp_path / "y").write_bytes(bytes(256) + np.ones(4, np.float32).tobytes())
    copied = [
        (on_disk(tmp_path / "z", value, 8), None, value),
        (there, (slice(0, 4), slice(0, 32)), value[:, :32]),
        (there.split(0, 4).rope_halves(), None, value[[0, 2, 1, 3]][None]),
        (concatenate([there, there], 0), None, np.concatenate([value, value])),
        (mapped_int8(MappedFile(tmp_path / "y"), 0, (4, 64), 64), None, np.zeros((4, 64), np.float32)),
    ]
    for array, index, expected in copied:
        view = array.view(index)
        assert view.flags.writeable and np.array_equal(view, expected)


def test_a_program_that_is_given_mapped_weights_to_overwrite_leaves_the_file_alone(tmp_path):
    value = np.arange(2**16, dtype=np.float32)
    taken = jax.device_put(on_disk(tmp_path / "x", value, ALIGNMENT).view(), jax.devices()[0])
    changed = jax.jit(lambda x: x + 1, donate_argnums=0)(taken)
    assert np.array_equal(changed, value + 1) and taken.is_deleted()
    assert (tmp_path / "x").read_bytes()[ALIGNMENT:] == value.tobytes()


def test_splits_the_last_axis(tmp_path):
    value = np.arange(60, dtype=np.float32).reshape(5, 12)
    parts = [on_disk(tmp_path / f"{i}", part) for i, part in enumerate(np.split(value, 3, axis=1))]
    array = concatenate(parts, axis=1).split(1, 6)
    assert np.array_equal(array.read(), value.reshape(5, 2, 6))
    assert np.array_equal(array.read((slice(1, 3), slice(1, 2), slice(2, 5))), value.reshape(5, 2, 6)[1:3, 1:2, 2:5])


def test_rope_rows_are_those_of_the_published_permutation(tmp_path):
    """Head width 8: Hugging Face's rows are Meta's rows 0 2 4 6 1 3 5 7 (llama-facts 2.3)."""
    rows = np.arange(16, dtype=np.float32).reshape(16, 1)
    halves = on_disk(tmp_path / "x", rows).split(0, 8).rope_halves().read()
    assert halves.reshape(2, 8).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7], [8, 10, 12, 14, 9, 11, 13, 15]]


def test_int8_values_are_scaled_by_group(tmp_path):
    """Groups of 4 in rows of 6: a group may run across a row."""
    values, scales = np.arange(-12, 12, dtype=np.int8), np.arange(1, 7, dtype=np.float32) / 3
    (tmp_path / "x").write_bytes(b"\0" * 5 + values.tobytes() + scales.tobytes())
    array = mapped_int8(MappedFile(tmp_path / "x"), 5, (4, 6), 4)
    expected = (values.reshape(-1, 4) * scales[:, None]).reshape(4, 6).astype(np.float32)
    assert array.read().tobytes() == expected.tobytes()
    split = array.split(0, 2).rope_halves()
    assert np.array_equal(split.read((slice(1, 2), slice(0, 2), slice(1, 5))), expected.reshape(2, 2, 6)[1:, :, 1:5])


def test_read_allocates_only_the_part(tmp_path):
    """Of a sparse file of 1 GiB: 1 MiB."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(2**30)
    array = mapped(MappedFile(path), 0, (2**18, 2**10), np.dtype(np.float32)).split(0, 128).rope_halves()
    tracemalloc.start()
    part = array.read((slice(8, 10), slice(0, 128), slice(0, 2**10)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.nbytes == 2**20 and peak < 1.1 * 2**20


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="resident pages are read from Linux's /proc")
def test_release_gives_pages_back(tmp_path):
    value = np.ones((64, 2**16), np.float32)
    array = on_disk(tmp_path / "x", value)

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text()
        section = text[text.index(str(tmp_path / "x")) :]
        return int(section.split("Rss:")[1].split()[0])

    assert equal(array, on_disk(tmp_path / "y", value)) and resident() < 64
    assert np.array_equal(array.read(), value) and resident() >= 16 * 1024
    array.release()
    assert resident() < 64
    assert np.array_equal(array.read(), value)


def test_equal_compares_bytes(tmp_path):
    zero, minus = np.zeros((3, 4), np.float32), -np.zeros((3, 4), np.float32)
    a, b = on_disk(tmp_path / "a", zero), on_disk(tmp_path / "b", minus)
    assert equal(a, a) and not equal(a, b) and not equal(a, on_disk(tmp_path / "c", zero[:2]))


def test_index_is_checked(tmp_path):
    array = on_disk(tmp_path / "x", np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="1 slices, the array 2 axes"):
        array.read((slice(0, 1),))
    with pytest.raises(ValueError, match="step 2"):
        array.read((slice(0, 4, 2), slice(0, 4)))
