"""What is planned: a model, a topology, a task, and everything that changes its memory or its time."""

import dataclasses
import difflib
import os

from llama_jax.choices import CACHE_DTYPES
from llama_jax.config import PRESETS, ModelConfig
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.mesh import MeshShape, resolve_mesh
from llama_jax.plan.topology import Topology, parse_topology

TASKS = ("train", "decode", "prefill")
DTYPES = {"bfloat16": 2, "float32": 4}  # bytes
OPTIMIZERS = ("adamw", "lion", "sgd")  # of llama_jax.training.optimizer.OPTIMIZERS, those that update in place
REMAT = ("none", "projections", "full")  # of llama_jax.model.stack.REMAT_POLICIES, those that stay on the device

# What is planned when the request does not say; lengths are cut to the model's.
TRAIN_LENGTH = 4096  # and one sequence per device
DECODE_BATCH, DECODE_LENGTH = 8, 2048
PREFILL_BATCH, PREFILL_LENGTH = 1, 2048


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """A checked request; every field has a value.

    Attributes:
        model: as the user named it.
        task: train: a step of `batch` sequences of `length` tokens. decode: one token for each of `batch` sequences, whose
            cache holds `length`. prefill: `batch` prompts of `length`.
        dtype: train: of the computation, parameters are float32. Otherwise of weights and computation.
        quantize: "" or "int8": the projections' and the head's weights.
        cache_dtype: of inference: "auto" (dtype) or "int8", with a float32 scale per token and head.
        optimizer, first_moment, remat: of training; first_moment is the dtype of adamw's and lion's.
        mesh: the only one considered; None: all that are legal.
    """

    model: str
    config: ModelConfig
    topology: Topology
    task: str
    batch: int
    length: int
    dtype: str = "bfloat16"
    quantize: str = ""
    cache_dtype: str = "auto"
    optimizer: str = "adamw"
    first_moment: str = "float32"
    remat: str = "full"
    mesh: MeshShape | None = None

    @property
    def trains(self) -> bool:
        return self.task == "train"

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return DTYPES[self.dtype]

    def rows(self, mesh: MeshShape) -> int:
        """Sequences per device; inference fills up the batch, training divides it."""
        return -(-self.batch // mesh.batch_shards)


def make_request(
    model: str,
    topology: str,
    task: str,
    *,
    batch: int | None = None,
    length: int | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    cache_dtype: str | None = None,
    optimizer: str | None = None,
    first_moment: str | None = None,
    remat: str | None = None,
    mesh: dict[str, int] | None = None,
) -> PlanRequest:
    """Fills in what was not said and refuses what cannot be planned.

    Args:
        model: a preset, or the directory of a checkpoint.
        mesh: sizes given for data, fsdp, tensor, dcn_data; None or {} to consider every mesh.

    Raises:
        LlamaError: an unknown name, or a combination that means nothing.
    """
    config, where = find_model(model), parse_topology(topology)
    _one_of("--task", task, TASKS)
    _one_of("--dtype", dtype, DTYPES)
    trains = task == "train"
    for flag, value, known in (
        ("--optimizer", optimizer, OPTIMIZERS),
        ("--first_moment", first_moment, DTYPES),
        ("--remat", remat, REMAT),
    ):
        if value is not None:
            _one_of(flag, value, known)
            if not trains:
                _refuse(f"{flag} {value} is of training, and the task is {task}: leave it out, or plan --task train")
    if quantize:
        _one_of("--quantize", quantize, ("int8",))
        if trains:
            _refuse("--quantize int8 is of inference, and the task is train: parameters are trained in float32")
    if cache_dtype is not None:
        _one_of("--cache_dtype", cache_dtype, CACHE_DTYPES)
        if trains:
            _refuse(f"--cache_dtype {cache_dtype} is of inference, and the task is train, which has no cache: leave it out")
    if first_moment == "bfloat16" and optimizer == "sgd":
        _refuse("--first_moment is of adamw and lion, and sgd has none: leave it out")
    for flag, value in (("--batch", batch), ("--length", length)):
        if value is not None and value < 1:
            _refuse(f"{flag} is {value}, expected 1 or more")
    default_length = {"train": TRAIN_LENGTH, "decode": DECODE_LENGTH, "prefill": PREFILL_LENGTH}[task]
    length = min(default_length, config.max_length) if length is None else length
    if length > config.max_length:
        _refuse(f"--length is {length:,}, and {model} is made for {config.max_length:,} tokens: shorten it")
    default_batch = {"train": where.num_devices, "decode": DECODE_BATCH, "prefill": PREFILL_BATCH}[task]
    batch = default_batch if batch is None else batch
    return PlanRequest(
        model=model,
        config=config,
        topology=where,
        task=task,
        batch=batch,
        length=length,
        dtype=dtype,
        quantize=quantize or "",
        cache_dtype=cache_dtype or "auto",
        optimizer=optimizer or "adamw",
        first_moment=first_moment or "float32",
        remat=remat or "full",
        mesh=_fixed_mesh(config, where, mesh, batch if trains else None) if mesh else None,
    )


def find_model(model: str) -> ModelConfig:
    """The config of a preset, or of a checkpoint's directory."""
    if model in PRESETS:
        return PRESETS[model]
    if os.path.isdir(model) or "://" in model:
        from llama_jax.checkpoint.store import Checkpoint  # imports jax: only for a directory

        return Checkpoint.open(model).config
    nearest = difflib.get_close_matches(model.lower().replace("-", "_"), PRESETS, 3, 0)
    raise LlamaError(
        ExitCode.BAD_REQUEST,
        f"unknown model {model!r}: neither a directory nor a preset; the nearest presets: {', '.join(nearest)}",
    )


def _fixed_mesh(cfg: ModelConfig, topology: Topology, given: dict[str, int], batch: int | None) -> MeshShape:
    """The mesh of the flags; what is left of the devices goes to fsdp (training) or tensor, unless another flag is -1."""
    if given.get("dcn_data", topology.slices) != topology.slices:
        raise LlamaError(
            ExitCode.BAD_MESH,
            f"--dcn_data is {given['dcn_data']}, and {topology.name} has {topology.slices} "
            f"slice{'s' * (topology.slices > 1)}: they must be equal",
        )
    rest = "tensor" if batch is None else "fsdp"
    sizes = {} if rest in given or -1 in given.values() else {rest: -1}
    wanted = MeshShape(**{**sizes, **given, "dcn_data": topology.slices})
    return resolve_mesh(cfg, wanted, topology.num_devices, batch_size=batch)


def _one_of(flag: str, value: str, known) -> None:
    if value not in known:
        _refuse(f"{flag} is {value!r}, expected one of {', '.join(known)}")


def _refuse(message: str) -> None:
    raise LlamaError(ExitCode.BAD_REQUEST, message)
