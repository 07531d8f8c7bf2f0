"""docs/configuration.md, from the files of configs/ and the dataclasses that read them.

A key is described by the attribute of its group's dataclass; by the comment beside it in its config file where no dataclass has
it, or has it in another type.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
from pages.docstrings import definition, fields, meanings

from configs import compare, lora, pretrain, sample
from llama_jax.config import PRESETS

TITLE = """# Configuration

Written by `python .ci/docs.py write` from `configs/` and the dataclasses that read them; nothing here is edited by hand.

A program takes `--config=configs/FILE.py` or `--config=configs/FILE.py:PRESET`, and any key as `--config.KEY=VALUE`. A preset
or key that does not exist is refused, with the nearest that does. Lists are given as `--config.sampling.stop='("END",)'`.
Defaults are those of a file without a preset; `""` or none means that nothing is given.
"""
GROUPS = {  # group of a config -> the dataclasses that read it
    "mesh": [("llama_jax/mesh.py", "MeshShape")],
    "sampling": [("llama_jax/generation/request.py", "Settings")],
    "train": [("train/recipe.py", "RunConfig"), ("llama_jax/training/step.py", "StepConfig")],
    "optimizer": [("llama_jax/training/optimizer.py", "OptimizerConfig")],
    "lora": [("llama_jax/model/lora.py", "LoraConfig")],
    "data": [("llama_jax/data/opening.py", "DataConfig")],
    "save": [("train/recipe.py", "SaveConfig")],
    "eval": [("train/recipe.py", "EvalConfig")],
    "log": [("train/recipe.py", "LogConfig")],
    "model": [("llama_jax/config.py", "ModelConfig")],
}
PROGRAMS = {  # heading -> config file; each says the keys that those before it do not have, or have with other defaults
    "Sampling": ("sample", ["chat", "score", "compare", "bench"]),
    "Training": ("pretrain", ["sft", "lora", "qlora", "train_bench"]),
}
COMMENT = re.compile(r"^\s*c\.([\w.]+)(?: = c\.[\w.]+)* = (?:.*?|\w+\(\n.*\n\s*\))  # (.*)$", re.MULTILINE)
KINDS = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "tuple[str, ...]": tuple,
    "Sequence[str]": tuple,
    "Sequence[int]": tuple,
}


def page() -> str:
    parts = [TITLE]
    for heading, (first, others) in PROGRAMS.items():
        base = _keys(first)
        parts.append(f"## {heading}: `configs/{first}.py`\n{_first(first)}\n\n{_table(base, _comments(first))}")
        for name in others:
            own = _keys(name)
            changed = {key: value for key, value in own.items() if key not in base or base[key] != value}
            gone = _gone(base, own)
            says = f"### `configs/{name}.py`\n{_first(name)} As `configs/{first}.py`"
            says += f", without {gone}" if gone else ""
            parts.append(f"{says}, and:\n\n{_table(changed, _comments(first) | _comments(name))}")
    parts += [_presets(), _model()]
    return "\n".join(parts)


def _config(name: str) -> ml_collections.ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


def _keys(name: str) -> dict[str, Any]:
    """Every key of a config file but the model's, as `group.key`."""

    def walk(config: ml_collections.ConfigDict, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in config:
            value = config[key]
            found |= walk(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else {prefix + key: value}
        return found

    return {key: value for key, value in walk(_config(name), "").items() if not key.startswith("model.")}


def _gone(base: dict[str, Any], own: dict[str, Any]) -> str:
    """Keys of `base` that `own` has not, whole groups by name."""
    missing = [key for key in base if key not in own]
    groups = {key.partition(".")[0] for key in own}
    whole = dict.fromkeys(key.partition(".")[0] if key.partition(".")[0] not in groups else key for key in missing)
    return ", ".join(f"`{key}`" for key in whole)


def _table(keys: dict[str, Any], comments: dict[str, str]) -> str:
    rows = [f"| `{key}` | {_default(value)} | {_cell(_meaning(key, value, comments))} |" for key, value in keys.items()]
    return _rows(("key", "default", ""), rows)


def _meaning(key: str, value: Any, comments: dict[str, str]) -> str:
    group, _, leaf = key.rpartition(".")
    comment = comments.get(key, "")
    for module, name in GROUPS.get(group, []):
        node = definition(module, name)
        text, kind = meanings(node).get(leaf), KINDS.get(fields(node).get(leaf, ("",))[0], ())
        if text and (not comment or isinstance(value, kind)):
            return text
    if not comment:
        raise LookupError(f"nothing says what config.{key} is: write a comment beside it, or an attribute of its dataclass")
    return comment


def _comments(name: str) -> dict[str, str]:
    """Key -> what stands beside it, in get_config of this file or in the function that makes its group."""
    groups = {"mesh": sample.mesh, "sampling": sample.sampling, "train": pretrain.train, "lora": lora.lora}
    groups |= {"a": compare.side, "b": compare.side}
    found = {f"{group}.{key}": says for group, make in groups.items() for key, says in _said(make).items()}
    return found | _said(importlib.import_module(f"configs.{name}").get_config)


def _said(function: Callable) -> dict[str, str]:
    return dict(COMMENT.findall(inspect.getsource(function)))


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"`{', '.join(map(str, value))}`" if value else "none"
    return '`""`' if value == "" else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("<", "&lt;").strip()


def _first(name: str) -> str:
    """What a config file says of itself, its command in code."""
    said = inspect.getdoc(importlib.import_module(f"configs.{name}")).split("\n\n")[0]
    what, _, command = " ".join(said.split()).partition(": python ")
    return f"{what}: `python {command.rstrip('.')}`."


def _presets() -> str:
    rows = [
        f"| `{name}` | {cfg.num_params:,} | {cfg.embed_dim:,} | {cfg.num_layers} | {cfg.num_heads} | {cfg.num_kv_heads} "
        f"| {cfg.mlp_dim:,} | {cfg.vocab_size:,} | {cfg.max_length:,} |"
        for name, cfg in PRESETS.items()
    ]
    columns = ("preset", "parameters", "D", "L", "N", "K", "F", "V", "context")
    heading = "## Models: `llama_jax.config.PRESETS`\nFor `pretrain`, `bench`, `train_bench` and the planner.\n\n"
    return heading + _rows(columns, rows)


def _model() -> str:
    node = definition("llama_jax/config.py", "ModelConfig")
    said = meanings(node)
    rows = [
        f"| `model.{name}` | {f'`{default}`' if default else 'that of the preset'} | {_cell(said[name])} |"
        for name, (_, default) in fields(node).items()
    ]
    heading = "## Keys of `model`\nFor `pretrain`; with `init_from`, the model is that of the checkpoint.\n\n"
    return heading + _rows(("key", "default", ""), rows)


def _rows(columns: Sequence[str], rows: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n" + "\n".join(rows) + "\n"
