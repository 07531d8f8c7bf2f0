"""How likely texts are, or what the model says after every token.

    python -m infer.score --config=configs/score.py --config.checkpoint=DIR --text FILE [--text FILE] [--documents]
    python -m infer.score --config=configs/score.py --config.checkpoint=DIR --tokens IN.npy --logits OUT.npy

A file is one document; of JSONL (.jsonl, .ndjson) every line is one, its `text`. Prints one JSON object over all of them:
tokens, log_likelihood (natural logarithm, summed), perplexity per token, and bits per byte of the texts; before it, with
--documents, a line of the same for each. A document longer than the window is scored in windows that overlap, each token once,
with at least window - stride tokens before it.
"""

import json
import math
from pathlib import Path

import numpy as np
from absl import flags

from infer import program
from infer.texts import Text, read_texts
from infer.windows import check_windows, log_likelihoods
from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError

CONFIG = program.define_config()
TEXT = flags.DEFINE_multi_string(
    "text", [], "file of UTF-8 text, or of JSONL with `text`, to score; may be given several times"
)
TOKENS = flags.DEFINE_string("tokens", None, "file of int32 ids [B, T] (.npy) to score")
LOGITS = flags.DEFINE_string("logits", None, "file (.npy) to write float32 logits [B, T, V] to; with --tokens")
DOCUMENTS = flags.DEFINE_bool("documents", False, "print a line for every document, or row of --tokens, too")


def main() -> None:
    config = CONFIG.value
    rows, texts, wants_logits = distributed.broadcast(_read() if distributed.is_main() else None)
    texts = [Text(*text) for text in texts]
    llama = program.load(config)
    if wants_logits:
        logits = np.concatenate([llama.logits([row]) for row in rows])
        if distributed.is_main():
            with open(LOGITS.value, "wb") as file:
                np.save(file, logits)
    if rows is None:
        if llama.tokenizer is None:
            raise LlamaError(ExitCode.BAD_TOKENIZER, "this checkpoint has no tokenizer: --config.tokenizer=FILE, or --tokens")
        rows = [llama.tokenizer.encode(text.text, bos=llama.tokenizer.bos_id is not None) for text in texts]
    window, stride = check_windows(config.window, config.stride, llama.max_length)
    names = [text.name for text in texts] or [f"{TOKENS.value}[{b}]" for b in range(len(rows))]
    if short := [name for name, row in zip(names, rows, strict=True) if len(row) < 2]:
        raise LlamaError(ExitCode.BAD_REQUEST, f"{short[0]}: nothing to score, a document needs at least 2 tokens")
    nbytes = [len(text.text.encode()) for text in texts] or [0] * len(rows)
    found = []
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        found.append(log_likelihoods(llama, row, window, stride))
        if DOCUMENTS.value:
            print(json.dumps({"document": number, "name": name} | _summary(found[-1], nbytes[number])), flush=True)
    print(json.dumps({"documents": len(rows)} | _summary(np.concatenate(found), sum(nbytes))))


def _read() -> tuple[list[list[int]] | None, list[Text], bool]:
    """The rows of --tokens or the texts of --text, and whether logits are asked for."""
    if bool(TEXT.value) == bool(TOKENS.value):
        raise LlamaError(ExitCode.BAD_REQUEST, "give one of --text FILE and --tokens IN.npy")
    if LOGITS.value and not TOKENS.value:
        raise LlamaError(ExitCode.BAD_REQUEST, "--logits goes with --tokens")
    rows = _read_tokens(Path(TOKENS.value)).tolist() if TOKENS.value else None
    return rows, read_texts(TEXT.value), bool(LOGITS.value)


def _summary(found: np.ndarray, nbytes: int) -> dict[str, float]:
    total = float(found.sum())
    summary = {
        "tokens": len(found),
        "log_likelihood": round(total, 4),
        "perplexity": round(math.exp(min(-total / len(found), 700.0)), 6),
    }
    return summary | ({"bits_per_byte": round(-total / math.log(2) / nbytes, 6)} if nbytes else {})


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
