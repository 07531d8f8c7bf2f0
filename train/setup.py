"""From a recipe and a WORKDIR to a run that is ready: model, data, mesh, and a state that is new or goes on."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from llama_jax import distributed
from llama_jax.checkpoint.adapter import adapter_record
from llama_jax.checkpoint.layout import Source
from llama_jax.checkpoint.store import Checkpoint
from llama_jax.config import ModelConfig
from llama_jax.data.batch import Batch
from llama_jax.data.dataset import PackedDataset
from llama_jax.data.opening import DataConfig, open_dataset
from llama_jax.data.pipeline import batch_rows
from llama_jax.data.sources import parse_sources
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.load import chat_format_of_weights, open_weights, tokenizer_of
from llama_jax.mesh import resolve_mesh
from llama_jax.ops.kernels.probe import choose_attention
from llama_jax.sharding import make_mesh
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.restoring import initial_params, restore
from llama_jax.training.saving import Retention, Saver
from llama_jax.training.state import StateForm, TrainState, init_state, trained_axes
from llama_jax.training.step import StepConfig, make_eval_step, make_train_step
from llama_jax.training.stored import state_layout
from train.feed import held_out_feed, train_feed
from train.recipe import Recipe, changed


@dataclasses.dataclass
class Run:
    """Everything that the loop needs.

    Attributes:
        step_config, form: how a step computes, what a state is made of.
        dataset, held_out: rows to train on, and of each held-out set by its name.
        state: before step first_step + 1.
        steps: in all.
    """

    recipe: Recipe
    workdir: epath.Path
    cfg: ModelConfig
    step_config: StepConfig
    form: StateForm
    mesh: Mesh
    tokenizer: Tokenizer | None
    chat_format: str
    dataset: PackedDataset
    held_out: Mapping[str, PackedDataset]
    steps: int
    saver: Saver
    state: TrainState
    first_step: int
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]

    def batches(self, step: int) -> Iterator[Batch]:
        """Batches on the mesh, from that of step + 1 on."""
        run, prefetch = self.recipe.run, self.recipe.data.prefetch
        return train_feed(self.dataset, self.mesh, batch_size=run.batch_size, seed=run.seed, start_step=step, prefetch=prefetch)

    def held_out_batches(self, dataset: PackedDataset) -> Iterator[Batch]:
        batches = held_out_feed(dataset, self.mesh, batch_size=self.recipe.run.batch_size)
        return itertools.islice(batches, self.recipe.eval.batches or None)

    def documents(self, step: int) -> list[str]:
        """FILE:RECORD of everything in the batch that made this step."""
        rows = batch_rows(self.dataset, step - 1, self.recipe.run.batch_size, self.recipe.run.seed)
        return list(dict.fromkeys(name for row in rows for name in self.dataset.documents_of(int(row))))


def prepare(recipe: Recipe, workdir: epath.Path, command: str, devices: Sequence[jax.Device] | None = None) -> Run:
    """Opens everything; a WORKDIR that holds a checkpoint of this recipe goes on from its newest.

    Args:
        devices: to spread the model over; all there are when not given.

    Raises:
        LlamaError: something the recipe names is missing, does not fit together, or is not what WORKDIR was begun with.
    """
    opened = open_weights(recipe.init_from) if recipe.init_from else None
    cfg = _model(recipe, opened)
    run = recipe.run
    shape = resolve_mesh(cfg, recipe.mesh, len(devices or jax.devices()), batch_size=run.batch_size // recipe.step.accumulate)
    mesh = make_mesh(shape, devices)
    step_config = _step_config(recipe, cfg, mesh)
    form = step_config.form(recipe.lora, recipe.base_dtype, recipe.quantize)
    tokenizer, files = _tokenizer(recipe, opened, cfg)
    chat_format = recipe.data.chat_format or (chat_format_of_weights(opened, tokenizer) if opened else "")
    open_data = functools.partial(_open_data, recipe, cfg, tokenizer, chat_format, workdir)
    dataset = open_data(recipe.data.train)
    held_out = {name: open_data(pattern) for name, pattern in _held_out(recipe.data).items()}
    steps = run.steps or max(1, round(run.epochs * len(dataset) / run.batch_size))
    optimizer = make_optimizer(dataclasses.replace(recipe.optimizer, total_steps=steps), trained_axes(cfg, form))
    layout = state_layout(cfg, optimizer, form, mesh=mesh)
    adapter = adapter_record(recipe.lora, opened) if recipe.lora.rank else None
    identity = _identity(recipe, dataset, steps) | ({"lora.base's weights": adapter["base_fingerprint"]} if adapter else {})
    saver = Saver(
        workdir,
        layout,
        Retention(recipe.save.keep, recipe.save.keep_every, recipe.save.keep_best),
        identity=identity,
        tokenizer_files=files,
        chat_format=chat_format,
        source={"kind": "trained", "path": recipe.init_from or "random parameters", "files": []},
        command=command,
        adapter=adapter,
    )
    going_on = saver.latest() is not None
    params = initial_params(opened, cfg, form, mesh=mesh) if opened and (recipe.lora.rank or not going_on) else None
    if going_on:
        state, _ = restore(workdir, layout, identity=identity, base=params)
    else:
        state = init_state(cfg, optimizer, jax.random.key(run.seed), form, mesh=mesh, params=params)
    kind = dict(lora=recipe.lora, base_dtype=recipe.base_dtype, quantize=recipe.quantize)
    return Run(
        recipe=recipe,
        workdir=workdir,
        cfg=cfg,
        step_config=step_config,
        form=form,
        mesh=mesh,
        tokenizer=tokenizer,
        chat_format=chat_format,
        dataset=dataset,
        held_out=held_out,
        steps=steps,
        saver=saver,
        state=state,
        first_step=int(state.step),
        train_step=make_train_step(cfg, step_config, optimizer, mesh, **kind),
        eval_step=make_eval_step(cfg, step_config, mesh, **kind),
    )


def _model(recipe: Recipe, opened: Checkpoint | Source | None) -> ModelConfig:
    cfg = changed(opened.config, recipe.model) if opened else ModelConfig(**recipe.model)
    if recipe.run.length > cfg.max_length:
        raise LlamaError(
            ExitCode.BAD_CONFIG,
            f"train.length is {recipe.run.length:,} and the model's context {cfg.max_length:,}: shorten it, or raise "
            "model.max_length",
        )
    return cfg


def _step_config(recipe: Recipe, cfg: ModelConfig, mesh: Mesh) -> StepConfig:
    """What depends on the devices: scanned layers, and whether the attention kernel works."""
    scan = mesh.devices.flat[0].platform == "tpu" if recipe.scan_layers is None else recipe.scan_layers
    kernels = choose_attention(recipe.attention, jax.local_devices()[0], cfg.head_dim, distributed.note)
    return dataclasses.replace(recipe.step, scan_layers=scan, kernels=kernels)


def _identity(recipe: Recipe, dataset: PackedDataset, steps: int) -> dict[str, Any]:
    """What a run that goes on must have as it was: all that decides which numbers come out."""
    names = ("batch_size", "length", "seed")
    found = {f"train.{name}": getattr(recipe.run, name) for name in names} | {"train.steps": steps}
    found |= {f"train.{name}": getattr(recipe.step, name) for name in ("dtype", "z_loss", "ema_decay", "freeze")}
    for group, values in (("optimizer", recipe.optimizer), ("lora", recipe.lora)):
        found |= {f"{group}.{name}": value for name, value in dataclasses.asdict(values).items() if name != "total_steps"}
    return found | {"the data (files, packing, tokenizer)": dataset.fingerprint}


def _tokenizer(recipe: Recipe, opened: Checkpoint | Source | None, cfg: ModelConfig) -> tuple[Tokenizer, Sequence[Path]]:
    """The tokenizer, and its files, which go into every checkpoint."""
    if recipe.tokenizer:
        tokenizer = load_tokenizer(recipe.tokenizer)
    elif opened is None:
        raise LlamaError(
            ExitCode.BAD_TOKENIZER, "there is no tokenizer: --config.tokenizer=FILE names one (a tokenizer.model, a folder)"
        )
    elif (tokenizer := tokenizer_of(opened)) is None:
        raise LlamaError(ExitCode.BAD_TOKENIZER, f"{recipe.init_from} has no tokenizer: --config.tokenizer=FILE names one")
    if tokenizer.vocab_size > cfg.vocab_size:
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {cfg.vocab_size:,}: take the model's own, or, for a "
            f"model from nothing, --config.model.vocab_size={tokenizer.vocab_size}",
        )
    if not recipe.tokenizer and isinstance(opened, Checkpoint):  # it was read from copies of these
        return tokenizer, [opened.path / name for name in opened.tokenizer]
    return tokenizer, tokenizer.files()


def _open_data(
    recipe: Recipe, cfg: ModelConfig, tokenizer: Tokenizer, chat_format: str, workdir: epath.Path, sources: str
) -> PackedDataset:
    """Rows of sources; the first process tokenises and packs, what the others then find."""

    def opened() -> PackedDataset:
        return open_dataset(
            sources,
            dataclasses.replace(recipe.data, chat_format=chat_format),
            tokenizer,
            length=recipe.run.length,
            seed=recipe.run.seed,
            cache=recipe.data.cache or workdir / "data",
            vocab_size=cfg.vocab_size,
        )

    dataset = opened() if distributed.is_main() else None
    distributed.broadcast(None)
    return dataset or opened()


def _held_out(data: DataConfig) -> dict[str, str]:
    """Patterns of the held-out sets by names: those of their files."""
    entries = parse_sources(data.eval) if data.eval else []
    names = [epath.Path(entry.pattern).name.partition(".")[0] or entry.pattern for entry in entries]
    if len(set(names)) < len(names):
        names = [entry.pattern for entry in entries]
    return dict(zip(names, (entry.pattern for entry in entries), strict=True))
