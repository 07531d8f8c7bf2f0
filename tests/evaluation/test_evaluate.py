"""The command: its own words, the columns of the table, and, where lm-eval is installed, whole runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llama_jax
from configs import eval as table
from llama_jax import evaluate
from llama_jax.config import PRESETS
from llama_jax.errors import LlamaError
from llama_jax.evaluation.arguments import check_model_args
from llama_jax.evaluation.columns import Column, Score, load_column
from tests.evaluation.tasks import write_tasks
from tests.generation.make import log_softmax

ROOT = Path(__file__).parents[2]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason=f"lm-eval is not installed: {evaluate.INSTALL}"
)

CONFIG = """
import ml_collections

COLUMNS = ("small",)

def get_config(column):
    return ml_collections.ConfigDict(dict(
        name="small_column",
        scores=[
            dict(name="Letters", task="story_letter", shots=2, metric="acc,none", group=False),
            dict(name="Sums", task="small_sums", shots=1, metric="exact_match,number", group=False),
            dict(name="Nowhere", task="", shots=0, metric="", group=False),
        ],
        published={"paper": {"Letters": 25.0, "Sums": 91.5, "mean": 58.2}},
        note="Small.",
    ))
"""


def run(monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *argv])
    evaluate.main()


def test_help_needs_nothing_and_lists_every_model_argument(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    run(monkeypatch, "--help")
    said = capsys.readouterr().out
    for word in ("checkpoint", "dtype", "quantize", "add_bos_token", "max_gen_toks", "tensor", "run --help"):
        assert word in said


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LlamaError, match=r'lm-eval is not installed.*pip install "lm-eval') as found:
        run(monkeypatch, "--checkpoint", "x", "--tasks", "piqa")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint": "x", "quantise": "int8"}, "has no quantise: did you mean quantize"),
        ({"checkpoint": "x", "max_length": "long"}, "max_length='long': expected int"),
        ({"checkpoint": "x", "max_gen_toks": 0}, "max_gen_toks=0: expected at least 1"),
        ({"dtype": "float32"}, "no checkpoint: --checkpoint DIR"),
    ],
)
def test_model_args_are_checked(given, said):
    with pytest.raises(LlamaError, match=said):
        check_model_args(given)


def test_what_lm_eval_passes_by_itself_is_taken():
    args = check_model_args({"checkpoint": 7, "batch_size": "auto:4", "max_batch_size": None, "device": "cpu"})
    assert (args.checkpoint, args.rows) == ("7", 16)
    assert check_model_args({"checkpoint": "x", "batch_size": 3}).rows == 3
    with pytest.raises(LlamaError, match="--batch_size many"):
        _ = check_model_args({"checkpoint": "x", "batch_size": "many"}).rows


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "hf", "--tasks", "piqa"], "this command runs llama_jax"),
        (["--published", "llama2_7b", "--tasks", "piqa"], "goes with --config"),
        (["--config", "configs/none.py:math"], "no file configs/none.py"),
        (["--config", "configs/eval.py"], "a preset is missing: .* code, commonsense"),
        (["--config", "configs/eval.py:maths"], "no preset 'maths': did you mean math"),
        (["--config", "configs/eval.py:math", "--published", "llama3_8b"], "has no llama3_8b; it has .*llama2_7b"),
        (["--config", "configs/eval.py:math", "--tasks", "piqa"], "says which tasks"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(monkeypatch, argv, said):
    monkeypatch.chdir(ROOT)
    with pytest.raises(LlamaError, match=said):
        run(monkeypatch, *argv)


@pytest.mark.parametrize("column", table.COLUMNS)
def test_published_columns_are_the_means_of_their_benchmarks(column):
    """But for the two numbers that the paper itself has wrong (docs/evaluation.md)."""
    loaded = load_column(f"{ROOT}/configs/eval.py:{column}", "llama2_7b")
    assert set(loaded.published) == set(table.MODELS) <= set(PRESETS)
    for model, published in loaded.published.items():
        values = [published[score.name] for score in loaded.scores]
        if column == "math" and model in ("llama2_7b", "llama2_13b"):
            assert published["mean"] == published["GSM8K"]
        else:
            assert published["mean"] == pytest.approx(sum(values) / len(values), abs=0.0601)


def test_a_report_has_the_published_numbers_beside_the_measured():
    scores = [Score("A", "a", 0, "acc,none"), Score("B", "b", -1, "acc,none", group=True, percent=True), Score("C")]
    column = Column("name", scores, {"m": {"A": 50.0, "B": 10.5, "C": 1.0, "mean": 20.5}}, "A note.")
    assert column.yaml() == "group: name\ntask:\n  - task: a\n    num_fewshot: 0\n  - group: b\n"
    lines = column.report({"a": {"acc,none": 0.25}, "b": {"acc,none": 50.0}}, "m").splitlines()
    assert lines[2] == "| benchmark | task | shots | metric | measured | published m |"
    assert lines[4:8] == [
        "| A | a | 0 | acc,none | 25.0 | 50 |",
        "| B | b | task's | acc,none | 50.0 | 10.5 |",
        "| C |  |  |  | not in lm-eval | 1 |",
        "| mean of 2 of 3 |  |  |  | 37.5 | 20.5 |",
    ]
    assert lines[-1] == "A note." and "published" not in column.report({})


@needs_harness
def test_every_task_of_the_table_is_one_of_lm_evals(tmp_path):
    script = tmp_path / "ask.py"
    script.write_text(
        "import json, sys\n"
        "from lm_eval.tasks import TaskManager\n"
        "manager = TaskManager()\n"
        "json.dump([manager.all_groups, manager.all_subtasks], sys.stdout)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    groups, tasks = json.loads(done.stdout.splitlines()[-1])
    for scores in table.COLUMNS.values():
        for score in scores:
            assert not score["task"] or score["task"] in (groups if score["group"] else tasks), score


@needs_harness
def test_a_column_runs_and_equals_what_its_likelihoods_say(tmp_path):
    """lm-eval in a process of its own, which warnings may not stop: two tasks with the shots of the column."""
    write_tasks(tmp_path / "tasks", 4)
    (tmp_path / "small.py").write_text(CONFIG)
    options = ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--log_samples"]
    done = harness(
        tmp_path, "--config", f"{tmp_path}/small.py:small", "--checkpoint", "bundled/checkpoint", "--published", "paper",
        "--model_args", "dtype=float32", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").glob("**/results_*.json")).read_text())
    assert results["n-shot"] == {"story_letter": 2, "small_sums": 1}
    letters = 100 * results["results"]["story_letter"]["acc,none"]
    assert f"| Letters | story_letter | 2 | acc,none | {letters:.1f} | 25 |" in done.stdout
    assert "| mean of 2 of 3 |" in done.stdout and done.stdout.rstrip().endswith("Small.")
    samples = next((tmp_path / "out").glob("**/samples_story_letter_*.jsonl")).read_text().splitlines()
    asked = json.loads(samples[0])
    context, letter = asked["arguments"]["gen_args_0"].values()
    llama = llama_jax.load(ROOT / "bundled/checkpoint", dtype="float32")
    tokens = llama.tokenizer.encode(context + letter, bos=True)[-llama.max_length - 1 :]  # two stories are longer
    expected = log_softmax(llama.logits([tokens[:-1]])[0, -1])[tokens[-1]]
    assert float(asked["resps"][0][0][0]) == pytest.approx(expected, abs=1e-4)


@needs_harness
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tasks", "no_such_task"], "Tasks not found: no_such_task"),
        (["--tasks", "piqa", "--model_args", "dtyp=float32"], "has no dtyp: did you mean dtype"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, argv, said):
    done = harness(tmp_path, "--checkpoint", "bundled/checkpoint", *argv)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: ") and said in done.stderr.splitlines()[-1]


def harness(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llama_jax.evaluate", *argv]
    return subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=600)
