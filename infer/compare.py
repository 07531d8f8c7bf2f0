"""Two models side by side: what they write, how likely a text is to each, and where their predictions part.

    python -m infer.compare --config=configs/compare.py --a DIR --b DIR --text FILE --prompt "Once upon" --output report.html

Float against quantised weights, before against after fine-tuning, any two models of one vocabulary. Writes one HTML file, and
prints one JSON object of its numbers. Without --text the samples of model a are the text; without --prompt each text's
beginning is one. docs/compare.md explains the numbers.
"""

import json
from pathlib import Path

import ml_collections
from absl import flags

from infer import program
from infer.texts import read_texts
from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError

CONFIG = program.define_config()
A = flags.DEFINE_string("a", None, "checkpoint of model a, as --config.a.checkpoint")
B = flags.DEFINE_string("b", None, "checkpoint of model b, as --config.b.checkpoint")
TEXT = flags.DEFINE_multi_string("text", [], "file of UTF-8 text, or of JSONL with `text`, to compare on; may be repeated")
PROMPT = flags.DEFINE_multi_string("prompt", [], "text that both models continue; may be given several times")
OUTPUT = flags.DEFINE_string("output", None, "HTML file to write")


def main() -> None:
    from infer.compare_page import page
    from infer.comparison import compare, open_sides, summary

    config = CONFIG.value
    settings = program.settings(config)
    checkpoints, texts, prompts = distributed.broadcast(_given(config) if distributed.is_main() else None)
    sides, tokenizer = open_sides(config, checkpoints)
    comparison = compare(config, sides, tokenizer, texts, prompts, settings)
    if distributed.is_main():
        Path(OUTPUT.value).write_text(page(comparison, tokenizer), encoding="utf-8", errors="replace")
        print(json.dumps(summary(comparison, tokenizer)))


def _given(config: ml_collections.ConfigDict) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """The two checkpoints, the texts and the prompts, checked before a model is read."""
    checkpoints = [A.value or config.a.checkpoint, B.value or config.b.checkpoint]
    for name, checkpoint in zip("ab", checkpoints, strict=True):
        if not checkpoint:
            raise LlamaError(ExitCode.BAD_REQUEST, f"no model {name}: --{name}=DIR names one that llama_jax.load takes")
    if not OUTPUT.value:
        raise LlamaError(ExitCode.BAD_REQUEST, "no --output: it names the HTML file to write, e.g. --output report.html")
    if Path(OUTPUT.value).is_dir() or not Path(OUTPUT.value).absolute().parent.is_dir():
        raise LlamaError(ExitCode.BAD_REQUEST, f"--output is {OUTPUT.value}, expected a file in a folder that exists")
    if config.max_tokens < 1:
        raise LlamaError(ExitCode.BAD_REQUEST, f"max_tokens is {config.max_tokens}, expected at least 1")
    return checkpoints, read_texts(TEXT.value), PROMPT.value


if __name__ == "__main__":
    program.run(main)
