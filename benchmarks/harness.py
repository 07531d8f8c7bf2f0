"""Our numbers against those of lm-eval's own Hugging Face backend, request by request, on the same weights in float32.

    python benchmarks/harness.py [--checkpoint bundled/checkpoint] [--documents 100]

For an environment with lm-eval[hf] (torch, transformers) beside llama_jax. The checkpoint is exported, both read the tasks of
tests/evaluation/tasks.py, and the table that is printed is that of docs/evaluation.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama_jax
from llama_jax.evaluation.encoding import encode
from llama_jax.evaluation.scoring import Request, batches, log_likelihoods, plan
from llama_jax.generation.reading import bucket
from tests.evaluation.tasks import NAMES, write_tasks

BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="bundled/checkpoint")
    parser.add_argument("--documents", type=int, default=100, help="of each task")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        write_tasks(scratch / "tasks", args.documents)
        exported = scratch / "exported"
        _run("llama_jax.export", "--checkpoint", args.checkpoint, "--output", str(exported))
        options = ["--tasks", ",".join(NAMES), "--include_path", str(scratch / "tasks"), "--log_samples", "--output_path"]
        hf = ["run", "--model", "hf", "--model_args", f"pretrained={exported},dtype=float32", "--device", "cpu"]
        commands = {
            "torch": ("lm_eval", *hf, "--batch_size", str(BATCH_SIZE), *options, str(scratch / "torch")),
            "ours": ("llama_jax.evaluate", "--checkpoint", args.checkpoint, "--model_args", "dtype=float32", *options),
        }
        commands["ours, one at a time"] = (*commands["ours"], str(scratch / "one"), "--batch_size", "1")
        commands["ours"] += (str(scratch / "ours"),)
        for name, command in commands.items():
            print(f"{name}: {_run(*command):.0f} s", file=sys.stderr)
        theirs = _read(scratch / "torch")
        for name, folder in (("ours", "ours"), ("ours, one at a time", "one")):
            print(f"\n{name}\n")
            _compare(_read(scratch / folder), theirs)
        print("\n| task | tokens read, apart | contexts once | seconds, apart | once |\n| --- | --- | --- | --- | --- |")
        _sharing(args.checkpoint, scratch / "tasks")


def _run(module: str, *options: str) -> float:
    """Runs a command; returns its seconds."""
    start = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", module, *options], env=environment, check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def _read(folder: Path) -> tuple[dict, dict]:
    """lm-eval's results and, by task, its samples in order."""
    results = json.loads(next(folder.glob("**/results_*.json")).read_text())["results"]
    samples = {}
    for task in NAMES:
        lines = next(folder.glob(f"**/samples_{task}_*.jsonl")).read_text().splitlines()
        samples[task] = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return results, samples


def _compare(ours: tuple[dict, dict], theirs: tuple[dict, dict]) -> None:
    print("| task | metric | ours | torch | requests | largest difference | otherwise |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for task in NAMES:
        pairs = list(zip(_answers(ours[1][task], task), _answers(theirs[1][task], task), strict=True))
        largest = max(abs(a - b) for (a, _), (b, _) in pairs)
        unequal = sum(a != b for (_, a), (_, b) in pairs)
        for metric, value in ours[0][task].items():
            other = theirs[0][task][metric]
            if isinstance(value, float) and "stderr" not in metric:
                print(f"| {task} | {metric} | {value:.6f} | {other:.6f} | {len(pairs)} | {largest:.1e} | {unequal} |")


def _answers(samples: list[dict], task: str) -> list[tuple[float, str]]:
    """Of every request its log-likelihood and whether greedy decoding writes it, or its text without the space around it.

    A document has a sample for every filter, with the same answers.
    """
    documents = {sample["doc_id"]: [answer for answers in sample["resps"] for answer in answers] for sample in samples}
    answers = [answer for document in documents.values() for answer in document]
    if task == "small_sums":
        return [(0.0, answer.strip()) for answer in answers]
    return [(float(a[0]), str(a[1])) if isinstance(a, list) else (float(a), "") for a in answers]


def _sharing(checkpoint: str, tasks: Path) -> None:
    """Prints the tokens and seconds that multiple choice takes with its contexts read once, and with every choice by itself."""
    llama = llama_jax.load(checkpoint, dtype="float32")
    for task in ("story_end", "story_letter"):
        documents = list(map(json.loads, (tasks / f"{task}_test.jsonl").read_text().splitlines()))
        by_choice = [
            [_pair(llama, d["beginning"], f" {d['ends'][k] if task == 'story_end' else 'ABCD'[k]}") for d in documents]
            for k in range(4)
        ]
        calls = {"together": [[pair for document in zip(*by_choice, strict=True) for pair in document]], "apart": by_choice}
        seconds, sums = {}, {}
        for name, parts in calls.items():
            for _ in range(2):  # the first compiles
                start = time.perf_counter()
                found = [log_likelihoods(llama, part, BATCH_SIZE) for part in parts]
                seconds[name] = time.perf_counter() - start
            sums[name] = sum(logprob for part in found for logprob, _ in part)
        apart, together = (sum(_tokens_read(part, llama.max_length) for part in calls[name]) for name in ("apart", "together"))
        print(f"| {task} | {apart:,} | {together:,} | {seconds['apart']:.2f} | {seconds['together']:.2f} |")
        assert abs(sums["together"] - sums["apart"]) < 1e-2 * len(documents)


def _tokens_read(requests: list[Request], max_length: int) -> int:
    """Padding included."""
    total = 0
    for batch in batches(plan(requests, max_length, BATCH_SIZE), BATCH_SIZE):
        tails = sum(len(reading.tails) for reading in batch)
        total += bucket(len(batch), BATCH_SIZE) * max(reading.shape[0] for reading in batch)
        total += bucket(tails, BATCH_SIZE) * batch[0].shape[1] if tails else 0
    return total


def _pair(llama: llama_jax.Llama, context: str, continuation: str) -> tuple[list[int], list[int]]:
    whole, ids = (encode(llama.tokenizer, text) for text in (context + continuation, context))
    return ids, whole[len(ids) :]


if __name__ == "__main__":
    main()
