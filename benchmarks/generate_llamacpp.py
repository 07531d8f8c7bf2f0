"""What llama.cpp takes to generate with TinyLlama-1.1B's shape; printed like infer.bench's lines.

    python benchmarks/generate_llamacpp.py [--dtype bf16 q8_0] [--batch 1 8] [--prompt 512] [--steps 16] [--folder DIR]

For an environment with gguf and llama-cpp-python, which this project does not install; built from source it uses this CPU's
instructions, and every line says which. Random weights, greedy, a thread for each CPU, the rest as llama.cpp has it (keys and
values are float16). The models, 2.2 and 1.2 GB, stay in --folder and are taken from there the next time. Only an idle machine
says anything: its threads wait for each other after every operation.
"""

import argparse
import ctypes
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time

import gguf
import llama_cpp
import numpy as np

VOCAB, WIDTH, MLP, LAYERS, HEADS, KV_HEADS, LENGTH = 32000, 2048, 5632, 22, 32, 4, 2048


def write_model(path: pathlib.Path, dtype: str) -> None:
    """Random weights of this type, norms in float32 as llama.cpp's own converter has them. A file of that name is whole."""
    partial, kind, random = path.with_suffix(".partial"), gguf.GGMLQuantizationType[dtype.upper()], np.random.default_rng(0)
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    norm, kv_width = np.ones(WIDTH, np.float32), WIDTH // HEADS * KV_HEADS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (kv_width, WIDTH), "attn_v": (kv_width, WIDTH), "attn_output": (WIDTH, WIDTH)}
    shapes |= {"ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
    shapes = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in ({"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH)} | shapes).items():
        weight = random.standard_normal(shape, np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name in ["output_norm", *(f"blk.{layer}.{part}_norm" for layer in range(LAYERS) for part in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


@llama_cpp.llama_log_callback
def print_error(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """For a log that otherwise names every tensor; the package's own filter by level leaves errors out (0.3.36)."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR in ggml.h
        sys.stderr.write(text.decode())


class Sequences:
    """As many sequences of one model as there are rows, all decoded by one call."""

    def __init__(self, model: ctypes.c_void_p, rows: int, length: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = rows * length, rows * length, rows
        params.n_threads = params.n_threads_batch = os.cpu_count()
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.batch = llama_cpp.llama_batch_init(rows * length, 0, 1)
        self.filled = 0

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """tokens: [B, T], put after those that are there. Returns [B, V], the last position's logits, valid until the next."""
        rows, length = tokens.shape
        self.batch.n_tokens = rows * length
        for i, (row, column) in enumerate(np.ndindex(rows, length)):
            self.batch.token[i], self.batch.pos[i] = int(tokens[row, column]), self.filled + column
            self.batch.n_seq_id[i], self.batch.seq_id[i][0], self.batch.logits[i] = 1, row, column == length - 1
        if code := llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode returned {code}")
        self.filled += length
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (rows, VOCAB))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.filled = 0

    def free(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)


def check(decode: Sequences, tokens: np.ndarray) -> None:
    """Logits are numbers, and other ones after other tokens. Leaves no token behind."""
    found = []
    for asked in (tokens, (tokens + 1) % VOCAB):
        found.append(decode(asked).copy())
        decode.clear()
    assert np.isfinite(found).all()
    assert (np.abs(found[0] - found[1]).max(-1) > 0.1 * found[0].std(-1)).all()


def measure(model: ctypes.c_void_p, batch: int, prompt: int, steps: int) -> dict:
    tokens = np.random.default_rng(1).integers(0, VOCAB, (batch, prompt))
    decode = Sequences(model, batch, prompt + steps + 2)
    check(decode, tokens[:, :32])
    start = time.perf_counter()
    token = decode(tokens).argmax(-1)[:, None]
    first_token_seconds, seconds = time.perf_counter() - start, []
    for _ in range(steps + 2):
        start = time.perf_counter()
        token = decode(token).argmax(-1)[:, None]
        seconds.append(time.perf_counter() - start)
    decode.free()
    step = statistics.median(seconds[2:])
    line = {"batch": batch, "first_token_seconds": first_token_seconds}
    line |= {"prefill_tokens_per_second": batch * prompt / first_token_seconds, "step_seconds": step}
    return line | {"tokens_per_second": batch / step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "q8_0"], choices=("bf16", "f16", "q8_0"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16, help="timed, after two that are not")
    parser.add_argument("--folder", type=pathlib.Path, help="keeps the models; without it they are written for this run alone")
    args = parser.parse_args()
    llama_cpp.llama_log_set(print_error, None)
    features = re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode())  # what its code was compiled with
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for dtype in args.dtype:
            path = folder / f"tinyllama_1b.{dtype}.gguf"
            if not path.exists():
                write_model(path, dtype)
            model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
            if model is None:
                raise RuntimeError(f"llama.cpp does not load {path}")
            for batch in args.batch:
                line = {"llama_cpp": llama_cpp.__version__, "features": features, "threads": os.cpu_count(), "dtype": dtype}
                print(json.dumps(line | measure(model, batch, args.prompt, args.steps)), flush=True)
            llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main()
