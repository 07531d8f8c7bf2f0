"""What a run is: a config file's groups as the frozen dataclasses of the rooms that read them."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections

from llama_jax.config import ModelConfig
from llama_jax.data.opening import DataConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape
from llama_jax.model.lora import LoraConfig
from llama_jax.training.optimizer import OptimizerConfig
from llama_jax.training.step import StepConfig

SCAN_LAYERS = {"auto": None, "true": True, "false": False}
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, and on how much at a time.

    Attributes:
        steps: updates; 0: as many as `epochs` are.
        epochs: passes over the data, when steps is 0.
        batch_size: rows of a step, over all devices.
        length: tokens of a row.
        seed: of parameters, shuffling and dropout.
    """

    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 8
    length: int = 2048
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 0), ("epochs", 0), ("batch_size", 1), ("length", 2)):
            if not getattr(self, name) >= least:
                _refuse(f"train.{name} is {getattr(self, name)}, expected {least} or more")
        if bool(self.steps) == bool(self.epochs):
            _refuse(f"train.steps is {self.steps} and train.epochs is {self.epochs}: one of them says how long, the other is 0")


@dataclasses.dataclass(frozen=True)
class SaveConfig:
    """When a checkpoint is written, and which are kept; the last step's always is.

    Attributes:
        every: steps; 0 for the end only.
        keep: the newest so many.
        keep_every: besides, those of steps that are its multiples, for ever; 0 for none.
        keep_best: besides, the so many of lowest evaluation loss.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0

    def __post_init__(self):
        for name, least in (("every", 0), ("keep", 1), ("keep_every", 0), ("keep_best", 0)):
            if getattr(self, name) < least:
                _refuse(f"save.{name} is {getattr(self, name)}, expected {least} or more")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is looked at during a run, and when.

    Attributes:
        every: steps; 0 for the end only.
        batches: of each held-out set, at most; 0 for all of it.
        prompts: continued (or, by a chat model, answered) at the same time, one a line; "" for none.
        max_new_tokens: of each.
    """

    every: int = 1000
    batches: int = 0
    prompts: str = ""
    max_new_tokens: int = 64

    def __post_init__(self):
        for name, least in (("every", 0), ("batches", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                _refuse(f"eval.{name} is {getattr(self, name)}, expected {least} or more")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where numbers go besides metrics.jsonl.

    Attributes:
        tensorboard: event files in WORKDIR/tensorboard.
        wandb: project of Weights & Biases; "" for none.
        report_seconds: between two drawings of report.png.
    """

    tensorboard: bool = True
    wandb: str = ""
    report_seconds: float = 60.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked config.

    Attributes:
        model: fields of ModelConfig: all of them for a model from nothing; with init_from, those that differ from it.
        init_from: the checkpoint to start from, "" for random parameters.
        tokenizer: its file or folder; "" for that of init_from.
        base_dtype, quantize: of a LoRA run's frozen parameters: float32 | bfloat16, and "" | int8.
        scan_layers: None: on TPUs.
        attention: auto | kernel | plain (llama_jax.ops.kernels.probe.choose_attention).
        profile: first and last step that a trace is written of; empty for none.
        values: the config as it was given, for run.json.
    """

    model: Mapping[str, Any]
    init_from: str
    tokenizer: str
    base_dtype: str
    quantize: str
    mesh: MeshShape
    run: RunConfig
    step: StepConfig
    scan_layers: bool | None
    attention: str
    optimizer: OptimizerConfig
    lora: LoraConfig
    data: DataConfig
    save: SaveConfig
    eval: EvalConfig
    log: LogConfig
    profile: tuple[int, ...]
    values: Mapping[str, Any]


def read_recipe(config: ml_collections.ConfigDict) -> Recipe:
    """The recipe of a config file.

    Raises:
        LlamaError: a group has a key that nobody reads, or a value that is out of range; by name.
    """
    values = config.to_dict()
    groups = {name: values.get(name) or {} for name in ("mesh", "train", "optimizer", "lora", "data", "save", "eval", "log")}
    train = dict(groups["train"])
    scan_layers, attention = str(train.pop("scan_layers", "auto")), train.pop("attention", "auto")
    if scan_layers.lower() not in SCAN_LAYERS:
        _refuse(f"train.scan_layers is {scan_layers!r}, expected one of {', '.join(SCAN_LAYERS)}")
    of_run = {field.name for field in dataclasses.fields(RunConfig)}
    step = {name: value for name, value in train.items() if name not in of_run or name == "seed"}
    lora = dict(groups["lora"])
    base_dtype, quantize = lora.pop("base_dtype", "float32"), lora.pop("quantize", "")
    recipe = Recipe(
        model=values.get("model") or {},
        init_from=values.get("init_from") or "",
        tokenizer=values.get("tokenizer") or "",
        base_dtype=base_dtype,
        quantize=quantize,
        mesh=_group(MeshShape, "mesh", groups["mesh"]),
        run=_group(RunConfig, "train", {name: value for name, value in train.items() if name in of_run}),
        step=_group(StepConfig, "train", step),
        scan_layers=SCAN_LAYERS[scan_layers.lower()],
        attention=attention,
        optimizer=_group(OptimizerConfig, "optimizer", groups["optimizer"]),
        lora=_group(LoraConfig, "lora", lora),
        data=_group(DataConfig, "data", groups["data"]),
        save=_group(SaveConfig, "save", groups["save"]),
        eval=_group(EvalConfig, "eval", groups["eval"]),
        log=_group(LogConfig, "log", groups["log"]),
        profile=_profile(values.get("profile") or ""),
        values=values,
    )
    if not recipe.init_from and not recipe.model:
        _refuse("there is nothing to start from: --config.init_from=DIR names a checkpoint, or Meta's or Hugging Face's files")
    if not recipe.init_from and recipe.lora.rank:
        _refuse(f"lora.rank is {recipe.lora.rank} and init_from is empty: an adapter needs a model, --config.init_from=DIR")
    if not recipe.data.train:
        _refuse("there is no data: --config.data.train=FILE names JSONL or text files, or what llama_jax.data.prepare wrote")
    return recipe


def changed(model: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
    """The model of init_from with the fields that a recipe sets; shapes may not change."""
    return dataclasses.replace(model, **_known(ModelConfig, "model", fields))


def _group(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    return kind(**_known(kind, name, values))


def _known(kind: type, group: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    known = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)
            _refuse(f"config.{group}.{name} is a key that nothing reads; the nearest one is {group}.{near[0]}")
    return values


def _profile(text: str) -> tuple[int, ...]:
    """ "20-22" -> (20, 22)."""
    if not text:
        return ()
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()) or int(last or first) < int(first):
        _refuse(f"profile is {text!r}, expected a step or FIRST-LAST, e.g. 20-22")
    return int(first), int(last or first)


def _refuse(message: str) -> None:
    raise LlamaError(ExitCode.BAD_CONFIG, message)
