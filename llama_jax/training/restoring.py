"""Going on from a checkpoint of a training run, or starting from anybody's weights."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from llama_jax import distributed
from llama_jax.checkpoint.arrays import everywhere
from llama_jax.checkpoint.layout import Source
from llama_jax.checkpoint.load import load_params, read_arrays
from llama_jax.checkpoint.store import DTYPES, ArrayReader, Checkpoint
from llama_jax.config import ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.model import Params
from llama_jax.training.saving import RUN, read_run
from llama_jax.training.state import StateForm, TrainState
from llama_jax.training.stored import StateLayout

SHOWN = 4  # of a list of differences
SHAPES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "tied_head")


def restore(
    path: epath.PathLike, layout: StateLayout, *, identity: Mapping[str, Any], base: Params | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """The state that was saved, to the bit, where the layout has it: on this mesh or another, layers scanned or not. Rows of
    padding are zeros.

    Args:
        path: STEP, or WORKDIR for its newest complete checkpoint.
        identity: as for the Saver.
        base: frozen parameters of a LoRA run, which its checkpoints do not have.

    Returns:
        The state, and what `Saver.save` was given as extra.

    Raises:
        LlamaError: there is no complete checkpoint of a training run, it is of another model, optimizer or adapter (with what
            differs), or an array cannot be read.
    """
    newest = str(Checkpoint.open(path).path) if distributed.is_main() else ""  # the others might see another one
    checkpoint = Checkpoint.open(distributed.broadcast(newest))
    run = _run_of(checkpoint)
    _check(checkpoint, run, layout, identity)
    remedy = f"remove {checkpoint.path} to go on from the checkpoint before it"
    arrays = {}
    with everywhere(f"{checkpoint.path} was not restored"):
        for room in dict.fromkeys(leaf.room for leaf in layout.leaves.values()):
            leaves = {path: leaf for path, leaf in layout.leaves.items() if leaf.room == room}
            reader = ArrayReader(checkpoint.path / room, remedy)
            targets = {leaf.name: leaf.target for leaf in leaves.values()}
            read = read_arrays(reader.array, targets, {leaf.name: leaf.shape for leaf in leaves.values()})
            arrays |= {path: read[leaf.name] for path, leaf in leaves.items()}
    state = layout.state(arrays)
    return (state if base is None else dataclasses.replace(state, params=base)), run["extra"]


def initial_params(opened: Checkpoint | Source, cfg: ModelConfig, form: StateForm, *, mesh: Mesh) -> Params:
    """Parameters to start from, in a form and on a mesh: what `init_state` takes.

    Args:
        opened: a checkpoint of ours, of Meta, Hugging Face or llama2.c (llama_jax.generation.load.open_weights).
        cfg: the model to train; its context and RoPE scaling may be other than the checkpoint's, its shapes may not.

    Raises:
        LlamaError: a shape differs, an array cannot be read, or the weights are stored quantised and are to be trained, or are
            a base of another form.
    """
    there, here = ({name: getattr(each, name) for name in SHAPES} for each in (opened.config, cfg))
    if wrong := _differences(there, here):
        raise LlamaError(
            ExitCode.WRONG_SHAPE, f"{opened.path} is another model: {wrong}. Leave config.model out, or correct it"
        )
    _check_floats(opened, form)
    with everywhere(f"{opened.path} was not loaded"):
        return load_params(opened, DTYPES[form.base_dtype], mesh=mesh, quantize=form.quantize, scan=form.scan)


def _check_floats(opened: Checkpoint | Source, form: StateForm) -> None:
    stored = opened.quantize if isinstance(opened, Checkpoint) else ""
    if not stored or stored == form.quantize:
        return
    frozen = ", or train an adapter over them as they are, with --config.lora.quantize=int8 (configs/qlora.py)"
    raise LlamaError(
        ExitCode.BAD_CONFIG,
        f"{opened.path} holds {stored} weights, and the run needs {form.quantize or 'floats'}: start from the checkpoint that "
        f"it was made from ({opened.command}){frozen if stored == 'int8' else ''}",
    )


def _run_of(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.path / RUN
    if not file.exists():
        raise LlamaError(
            ExitCode.NOT_A_CHECKPOINT,
            f"{checkpoint.path} has weights and no {RUN}, it is no training run's: start from its weights, with "
            f"--config.init_from={checkpoint.path} and another --workdir",
        )
    try:
        return read_run(checkpoint.path)
    except ValueError:
        raise LlamaError(
            ExitCode.TRUNCATED, f"{file} is damaged: remove {checkpoint.path} to go on from the checkpoint before it"
        ) from None


def _check(checkpoint: Checkpoint, run: Mapping[str, Any], layout: StateLayout, identity: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that is not this run's, by name: settings first, since arrays follow from them."""
    there = _model(checkpoint.config) | run["identity"]
    here = _model(layout.cfg) | json.loads(json.dumps(layout.identity() | dict(identity)))
    if wrong := _differences(there, here) or _differences(run["arrays"], layout.arrays()):
        raise LlamaError(
            ExitCode.BAD_CONFIG,
            f"{checkpoint.path} cannot be gone on from: {wrong}. Set the config to what the run had, or start a new run from "
            f"its weights, with --config.init_from={checkpoint.path} and another --workdir",
        )


def _model(cfg: ModelConfig) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in dataclasses.asdict(cfg).items()}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    wrong = [
        f"{name} is {there.get(name, 'absent')} in the checkpoint and {here.get(name, 'absent')} in the config"
        for name in dict.fromkeys((*here, *there))
        if name not in there or name not in here or there[name] != here[name]
    ]
    return "; ".join(wrong[:SHOWN]) + (f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
