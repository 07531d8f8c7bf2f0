"""Damaged and hostile files: a reader raises LlamaError or gives arrays, and takes no more memory than the file has bytes.

Every example changes a small valid checkpoint, opens it and reads every tensor. Changes are drawn where the structure is
(pickle, directory, header), because a changed weight proves nothing. Hypothesis draws a seed and the edits come from it:
drawing each edit by itself costs five times what the readers take.
"""

import json
import random
import struct
import tracemalloc
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint.source import open_source
from llama_jax.checkpoint.torch_pickle import read_state_dict
from llama_jax.errors import LlamaError
from tests.checkpoint.make import meta_tiny, random_params, write_huggingface, write_llama2c, write_meta

CFG = meta_tiny(vocab_size=3, embed_dim=4, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=5, max_length=2)
PARAMS = random_params(CFG)
SLACK = 2**19  # Python's own objects: tables of names, messages, tracebacks
NUMBERS = [0, 1, 2, 3, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
SEEDS = st.integers(0, 2**64 - 1).map(random.Random)


def fuzz(examples: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    phases = [Phase.explicit, Phase.generate]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks, database=None, phases=phases)


def survives(path: Path, weights: int) -> None:
    """Opens, reads everything; only LlamaError may escape, and the peak is bounded by 4 times the bytes of the weight files."""
    bound = 4 * weights + SLACK
    # Twice where once is too much: what the process loads only once is not what the file asked for.
    assert peak_bytes(path, weights) < bound or peak_bytes(path, weights) < bound


def peak_bytes(path: Path, weights: int) -> int:
    tracemalloc.start()
    try:
        source = open_source(path)
        for array in (*source.params.values(), *source.raw.values()):
            assert array.read().nbytes == array.nbytes <= 4 * weights
    except LlamaError as e:
        assert 20 < len(str(e)) < 2000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def number(rng: random.Random) -> bytes:
    form = rng.choice(["<B", "<H", "<I", "<Q"])
    return struct.pack(form, rng.choice(NUMBERS) % 256 ** struct.calcsize(form))


def mutate(rng: random.Random, data: bytes, ranges: list[tuple[int, int]]) -> bytes:
    """One to four changes in the parts of `data` where the structure is."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        lo, hi = rng.choice(ranges)
        at, count = min(rng.randrange(lo, hi), len(out)), rng.randint(1, 40)
        payload = number(rng) if rng.random() < 0.5 else rng.randbytes(rng.randint(1, 6))
        match rng.choice(["flip", "flip", "flip", "set", "set", "insert", "delete", "cut", "copy"]):
            case "flip":
                out[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in out[at : at + 1])
            case "set":
                out[at : at + len(payload)] = payload
            case "insert":
                out[at:at] = payload
            case "delete":
                del out[at : at + count]
            case "cut":
                del out[at:]
            case "copy":
                out[at:at] = out[at : at + count]
    return bytes(out)


def replace(path: Path, data: bytes) -> int:
    """A new file in the place of one that may still be mapped. Returns its size."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return len(data)


def good(path: Path) -> bytes:
    """The bytes that a file had when it was first seen."""
    kept = path.with_name(path.name + ".good")
    if not kept.exists():
        kept.write_bytes(path.read_bytes())
    return kept.read_bytes()


def torch_parts(data: bytes) -> list[tuple[int, int]]:
    """The pickle, the local header of the second entry, the directory."""
    return [(0, data.index(b"PK\3\4", 4) + 60), (data.index(b"PK\1\2"), len(data)), (len(data) - 22, len(data))]


@fuzz(1200)
@given(rng=SEEDS)
def test_meta(tmp_path, rng):
    if not (tmp_path / "params.json").exists():
        write_meta(tmp_path, CFG, PARAMS)
    path = tmp_path / "consolidated.00.pth"
    survives(tmp_path, replace(path, mutate(rng, good(path), torch_parts(good(path)))))


@fuzz(500)
@given(rng=SEEDS)
def test_torch_bin(tmp_path, rng):
    if not (tmp_path / "config.json").exists():
        write_huggingface(tmp_path, CFG, PARAMS, suffix=".bin")
    path = tmp_path / "pytorch_model.bin"
    survives(tmp_path, replace(path, mutate(rng, good(path), torch_parts(good(path)))))


OPCODES = [bytes([op]) for op in b"\x80\x95N\x88\x89KMJ\x8aGX\x8cU}])\x85\x86\x87t(01qr\x94hjsuaec\x93QRbio\x81\x92\x82B."]
WORDS = [
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"X\1\0\0\0a",
    b"(",
    b"K\1",
]


@fuzz(2500)
@given(rng=SEEDS)
def test_pickle_programs(rng):
    """Instructions in any order."""
    program = b"".join(rng.choice([rng.choice(OPCODES), rng.choice(WORDS), number(rng)]) for _ in range(rng.randint(1, 60)))
    try:
        read_state_dict(b"\x80\2" + program + b".", "data.pkl")
    except LlamaError as e:
        assert len(str(e)) < 2000


@fuzz(1200)
@given(rng=SEEDS)
def test_safetensors(tmp_path, rng):
    if not (tmp_path / "config.json").exists():
        write_huggingface(tmp_path, CFG, PARAMS)
    path = tmp_path / "model.safetensors"
    header = int.from_bytes(good(path)[:8], "little")
    survives(tmp_path, replace(path, mutate(rng, good(path), [(0, 8), (8, 8 + header), (8, 8 + header)])))


VALUES = [
    None, True, False, *NUMBERS, 10**400, -1, -(2**63), 1e308, float("inf"), float("nan"), 0.5, "", "x", "BF16", "F64", "I8",
    "../x", "model.safetensors", "\ud800", "9" * 99, [], {}, [[[]]], [0], [1, 2], [2, 1], [2**40, 2**40], [0, 16], [16, 2**40],
    {"rope_type": "yarn", "factor": 0}, {"type": "linear", "factor": "2"}, {"rope_type": []},
]  # fmt: skip


def change(rng: random.Random, value: object) -> object:
    """A JSON value with one place in it, or all of it, replaced."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    copy = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value, dict) and rng.random() < 0.1:
        copy["new"] = copy.pop(key)
    else:
        copy[key] = change(rng, value[key])
    return copy


@fuzz(500)
@given(rng=SEEDS)
def test_safetensors_fields(tmp_path, rng):
    if not (tmp_path / "config.json").exists():
        write_huggingface(tmp_path, CFG, PARAMS)
    path = tmp_path / "model.safetensors"
    end = 8 + int.from_bytes(good(path)[:8], "little")
    header = json.dumps(change(rng, json.loads(good(path)[8:end]))).encode()
    survives(tmp_path, replace(path, struct.pack("<Q", len(header)) + header + good(path)[end:]))


@fuzz(600)
@given(rng=SEEDS)
def test_json_fields(tmp_path, rng):
    if not (tmp_path / "h").exists():
        write_huggingface(tmp_path / "h", CFG, PARAMS, 2)
        write_meta(tmp_path / "m", CFG, PARAMS)
    path = tmp_path / rng.choice(["h/config.json", "h/model.safetensors.index.json", "m/params.json"])
    replace(path, json.dumps(change(rng, json.loads(good(path)))).encode())
    survives(path.parent, 2**16)
    replace(path, good(path))


@fuzz(800)
@given(rng=SEEDS)
def test_llama2c(tmp_path, rng):
    """Half of the time the file is made as long as the changed header asks for, where that is short."""
    version = rng.randrange(3)
    path = tmp_path / "m.bin"
    write_llama2c(path, CFG, PARAMS, version, group=2)
    data = mutate(rng, path.read_bytes(), [(0, 41 if version else 28)])
    size = replace(path, data)
    try:
        open_source(path)
    except LlamaError as e:
        words = str(e).split(" describes ")
        wanted = words[1].split(":")[0] if len(words) == 2 else ""
        if rng.random() < 0.5 and wanted.isdigit() and int(wanted) < 2**14:
            size = replace(path, data[: int(wanted)].ljust(int(wanted), b"\0"))
    survives(path, size)
