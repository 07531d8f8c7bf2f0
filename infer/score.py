"""How likely a text is, or what the model says after every token.

    python -m infer.score --config=configs/score.py --config.checkpoint=DIR --text FILE
    python -m infer.score --config=configs/score.py --config.checkpoint=DIR --tokens IN.npy --logits OUT.npy

Prints one JSON object: tokens, log_likelihood (natural logarithm, summed), perplexity per token, and bits per byte of a text.
Texts longer than the window are scored in windows that overlap, each token once, with at least half a window before it.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from infer import program
from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError

CONFIG = program.define_config()
TEXT = flags.DEFINE_string("text", None, "file of UTF-8 text to score")
TOKENS = flags.DEFINE_string("tokens", None, "file of int32 ids [B, T] (.npy) to score")
LOGITS = flags.DEFINE_string("logits", None, "file (.npy) to write float32 logits [B, T, V] to; with --tokens")


def log_likelihoods(llama: Any, tokens: Sequence[int], window: int, stride: int) -> np.ndarray:
    """Log-probability of each of tokens[1:], [T - 1], computed in windows that begin `stride` tokens apart."""
    found = np.zeros(len(tokens) - 1)
    begin = done = 0
    while done < len(found):
        end = min(begin + window, len(tokens))
        scored = llama.score(tokens[begin:end]).logprobs
        found[done : end - 1] = scored[done - begin :]
        done, begin = end - 1, begin + stride
    return found


def main() -> None:
    config = CONFIG.value
    rows, text, wants_logits = distributed.broadcast(_read() if distributed.is_main() else None)
    llama = program.load(config)
    if wants_logits:
        logits = np.concatenate([llama.logits([row]) for row in rows])
        if distributed.is_main():
            with open(LOGITS.value, "wb") as file:
                np.save(file, logits)
    if rows is None:
        if llama.tokenizer is None:
            raise LlamaError(ExitCode.BAD_TOKENIZER, "this checkpoint has no tokenizer: --config.tokenizer=FILE, or --tokens")
        rows = [llama.tokenizer.encode(text, bos=llama.tokenizer.bos_id is not None)]
    window, stride = _window(config, llama.max_length)
    if min(map(len, rows)) < 2:
        raise LlamaError(ExitCode.BAD_REQUEST, "nothing to score: a row needs at least 2 tokens")
    found = np.concatenate([log_likelihoods(llama, row, window, stride) for row in rows])
    print(json.dumps(_summary(found, len(text.encode()))))


def _read() -> tuple[list[list[int]] | None, str, bool]:
    """The rows of --tokens or the text of --text, and whether logits are asked for."""
    if bool(TEXT.value) == bool(TOKENS.value):
        raise LlamaError(ExitCode.BAD_REQUEST, "give one of --text FILE and --tokens IN.npy")
    if LOGITS.value and not TOKENS.value:
        raise LlamaError(ExitCode.BAD_REQUEST, "--logits goes with --tokens")
    rows = _read_tokens(Path(TOKENS.value)).tolist() if TOKENS.value else None
    return rows, _read_text(Path(TEXT.value)) if TEXT.value else "", bool(LOGITS.value)


def _summary(found: np.ndarray, nbytes: int) -> dict[str, float]:
    total = float(found.sum())
    summary = {
        "tokens": len(found),
        "log_likelihood": round(total, 4),
        "perplexity": round(math.exp(min(-total / len(found), 700.0)), 6),
    }
    return summary | ({"bits_per_byte": round(-total / math.log(2) / nbytes, 6)} if nbytes else {})


def _window(config: Any, max_length: int) -> tuple[int, int]:
    stride = config.stride or max(1, max_length // 2)
    if not 1 <= stride < max(max_length, 2):
        raise LlamaError(ExitCode.BAD_REQUEST, f"stride is {stride}, expected 1 to {max_length - 1}, less than a window")
    return max_length, stride


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LlamaError(ExitCode.BAD_REQUEST, f"cannot read {path} as UTF-8 text: {error}") from None
    if not text:
        raise LlamaError(ExitCode.BAD_REQUEST, f"{path} is empty: nothing to score")
    return text


def _read_tokens(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            tokens = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise LlamaError(ExitCode.BAD_REQUEST, f"cannot read {path} as a .npy array: {error}") from None
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise LlamaError(ExitCode.BAD_REQUEST, f"{path} holds {tokens!r:.80}, expected integers [B, T]")
    return tokens


if __name__ == "__main__":
    program.run(main)
