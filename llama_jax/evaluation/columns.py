"""Columns of a paper's table: from a config file to lm-eval's tasks, and its results beside the paper's numbers."""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.choices import check_preset
from llama_jax.errors import ExitCode, LlamaError

FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<column>\w+))?")


@dataclasses.dataclass(frozen=True)
class Score:
    """One benchmark of a column.

    Attributes:
        name: as the paper has it.
        task: lm-eval's name; "" where it has none.
        shots: examples in the prompt; -1: as the task has them, and only that works.
        metric: "METRIC,FILTER", a key of lm-eval's results.
        group: whether the task is a group of tasks.
        percent: whether lm-eval's metric is in percent already.
    """

    name: str
    task: str = ""
    shots: int = 0
    metric: str = ""
    group: bool = False
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: of the column and of the group of tasks that lm-eval runs.
        scores: what it is the mean of.
        published: model -> the paper's numbers in percent, by benchmark, and the column's own under "mean".
        note: what a reader should know about it.
    """

    name: str
    scores: Sequence[Score]
    published: Mapping[str, Mapping[str, float]]
    note: str = ""

    def yaml(self) -> str:
        """A group of lm-eval's, with the shots of each task."""
        lines = [f"group: {self.name}", "task:"]
        for score in self.scores:
            if score.task:
                lines.append(f"  - {'group' if score.group else 'task'}: {score.task}")
                lines += [f"    num_fewshot: {score.shots}"] if score.shots >= 0 else []
        return "\n".join(lines) + "\n"

    def report(self, results: Mapping[str, Mapping[str, Any]], model: str = "") -> str:
        """A table in Markdown of what was measured, in percent, beside what the paper says of a model.

        Args:
            results: lm-eval's, task -> metric -> value.
            model: a key of `published`, or "".
        """
        known = self.published.get(model, {})
        rows, measured = [], []
        for score in self.scores:
            value = results.get(score.task, {}).get(score.metric)
            if isinstance(value, int | float):
                measured.append(value if score.percent else 100 * value)
            shots = "" if not score.task else "task's" if score.shots < 0 else str(score.shots)
            said = "not in lm-eval" if not score.task else f"{measured[-1]:.1f}" if value is not None else "not measured"
            rows.append([score.name, score.task, shots, score.metric, said, _number(known.get(score.name))])
        whole = len(measured) == len(self.scores)
        mean = f"{sum(measured) / len(measured):.1f}" if measured else ""
        rows.append([f"mean of {len(measured)}" + ("" if whole else f" of {len(self.scores)}"), "", "", "", mean])
        rows[-1].append(_number(known.get("mean")))
        head = ["benchmark", "task", "shots", "metric", "measured", f"published {model}"]
        if not model:
            head, rows = head[:-1], [row[:-1] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        return "\n".join([f"{self.name}", "", *lines, *(["", self.note] if self.note else [])])


def load_column(text: str, model: str = "") -> Column:
    """The column of `FILE.py:COLUMN`, a file whose get_config(COLUMN) gives name, scores, published and note.

    Args:
        model: whose published numbers will be asked for, or "".

    Raises:
        LlamaError: there is no such file, column or model.
    """
    found = FILE.fullmatch(text)
    path, column = Path(found["path"]), found["column"] or ""
    if not path.is_file():
        raise LlamaError(ExitCode.BAD_REQUEST, f"--config: no file {path}")
    spec = importlib.util.spec_from_file_location("llama_jax_eval_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_preset(column, module.COLUMNS)
    config = module.get_config(column).to_dict()
    loaded = Column(
        name=config["name"],
        scores=[Score(**score) for score in config["scores"]],
        published=config["published"],
        note=config["note"],
    )
    if model and model not in loaded.published:
        raise LlamaError(ExitCode.BAD_REQUEST, f"--published has no {model}; it has {', '.join(loaded.published)}")
    return loaded


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
