"""From a directory of weights to a model that generates: checkpoint, mesh, tokenizer."""

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from etils import epath
from jax.sharding import Mesh

from llama_jax.checkpoint.adapter import adapted, check_base, stored_adapter
from llama_jax.checkpoint.peft import is_peft, read_peft
from llama_jax.checkpoint.quantized import check_method, stored_method
from llama_jax.checkpoint.source import Source, open_source
from llama_jax.checkpoint.store import DTYPES, Checkpoint
from llama_jax.choices import CACHE_DTYPES, COMPUTE_DTYPES
from llama_jax.config import ModelConfig
from llama_jax.distributed import note
from llama_jax.errors import ExitCode, LlamaError
from llama_jax.generation.draft import LOOKUP, check_draft, check_same_tokens, draft_model, lookup
from llama_jax.generation.layout import load_laid_out
from llama_jax.generation.llama import Llama
from llama_jax.mesh import MeshShape, resolve_mesh
from llama_jax.ops.kernels.probe import choose_kernels
from llama_jax.sharding import make_mesh
from llama_jax.text.chat import chat_format_of
from llama_jax.text.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer

CACHE_DIR = "~/.cache/llama_jax"


def load(
    checkpoint: epath.PathLike,
    *,
    mesh: MeshShape | Mapping[str, int] | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    cache_dtype: str = "auto",
    max_length: int = 0,
    tokenizer: str | Path | None = None,
    batch_size: int = 16,
    adapter: epath.PathLike = "",
    draft: str = "",
    draft_tokens: int = 0,
) -> Llama:
    """Loads a checkpoint onto the default device, or spread over a mesh of all devices of all processes.

    Compiled programs are kept in ~/.cache/llama_jax, or where JAX_COMPILATION_CACHE_DIR says, and found again by later runs.
    On a CPU, weights that lie in the source's files as they are needed (an export of llama_jax, most of Meta's) are not copied:
    do not write to such files while the model is in use.

    Args:
        checkpoint: a directory made by llama_jax.convert, the WORKDIR of a training run, or the source itself: a folder of
            Meta's or Hugging Face's, or a file of llama2.c (which convert would also check for values that are not finite).
        mesh: sizes of its axes, e.g. {"tensor": 8} or {"tensor": -1}, as far as the model allows; every device then reads
            and holds its own part. None: one device.
        dtype: of weights and activations: bfloat16, float16, float32, or "auto": as stored, except that float16 becomes
            bfloat16, which every accelerator multiplies, and float64 becomes float32.
        quantize: how projections and head are rounded (a tied head stays as it is): "int8" or "fp8", 8 bits with a scale per
            output; "int4", 4 bits with a scale per 128 inputs; "w8a8", int8 whose activations are rounded, too, which a CPU
            multiplies fastest. Weights that are stored quantised (llama_jax.quantize) need none, and are not rounded again.
        cache_dtype: of keys and values: "auto", the compute dtype, or "int8", with a scale per token and head: half of
            bfloat16's memory. Prompts are read with keys and values as they were computed; decoding, score and logits read
            rounded ones.
        max_length: tokens of prompt and answer together; the model's context when 0.
        tokenizer: its file or folder, when the checkpoint has none.
        batch_size: the most sequences generated at once; more wait their turn.
        adapter: of a LoRA run (WORKDIR or one of its checkpoints, which by itself is loaded over its own base), or a folder of
            PEFT's: added to the weights as they are read.
        draft: what guesses tokens, several of which one step then checks; the text stays what it is without. "lookup": what
            followed the last tokens where the text had them before. Otherwise a smaller model of the same tokens, as
            `checkpoint`.
        draft_tokens: guesses a step; 0 for 7 looked up, 4 of a model.

    Raises:
        LlamaError: there is no complete checkpoint, or a setting is out of range.
    """
    prepared = prepare(
        checkpoint,
        mesh=mesh,
        dtype=dtype,
        quantize=quantize,
        cache_dtype=cache_dtype,
        max_length=max_length,
        tokenizer=tokenizer,
        batch_size=batch_size,
        adapter=adapter,
        draft=draft,
        draft_tokens=draft_tokens,
    )
    return prepared.load()


def prepare(
    checkpoint: epath.PathLike,
    *,
    mesh: MeshShape | Mapping[str, int] | None,
    dtype: str,
    quantize: str | None,
    cache_dtype: str,
    max_length: int,
    tokenizer: str | Path | None,
    batch_size: int = 16,
    adapter: epath.PathLike = "",
    draft: str = "",
    draft_tokens: int = 0,
) -> "Prepared":
    """What `load` does before it reads weights: opens them, checks its arguments, and says what a user should know."""
    opened = open_weights(checkpoint, adapter)
    dtype = compute_dtype(opened, dtype)
    _check(max_length, cache_dtype, batch_size)
    check_method(opened, quantize or "")
    check_draft(draft, draft_tokens)
    small = open_weights(draft) if draft not in ("", LOOKUP) else None
    text = tokenizer_of(opened, tokenizer)
    if small:
        check_same_tokens(small.config, tokenizer_of(small), opened.config, text)
    prepared = Prepared(
        opened=opened,
        small=small,
        tokenizer=text,
        mesh=_mesh(opened.config, mesh),
        dtype=dtype,
        quantize=quantize or "",
        cache_dtype=cache_dtype,
        max_length=max_length or opened.config.max_length,
        batch_size=batch_size,
        draft=draft,
        draft_tokens=draft_tokens,
    )
    for line in prepared.notes():
        note(line)
    return prepared


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model that can be loaded: weights that are open, and settings that they allow, as `load` explains them.

    Attributes:
        opened: the weights.
        small: those of a draft that is a model.
        tokenizer: None where there is none.
        mesh: None for one device.
        dtype: one of COMPUTE_DTYPES.
    """

    opened: Checkpoint | Source
    small: Checkpoint | Source | None
    tokenizer: Tokenizer | None
    mesh: Mesh | None
    dtype: str
    quantize: str
    cache_dtype: str
    max_length: int
    batch_size: int
    draft: str
    draft_tokens: int

    def notes(self) -> Iterator[str]:
        """What a user should know of the settings before they cost anything."""
        longest = self.opened.config.max_length
        stored, method = stored_method(self.opened), self.quantize or getattr(self.opened, "quantize", "")
        if self.max_length > longest:
            yield f"warning: max_length {self.max_length:,} is beyond the {longest:,} tokens this model was made for"
        if stored and not method:
            yield f"note: {stored} weights and an adapter become floats together; quantize rounds their sum"
        if method not in ("", "w8a8") and jax.local_devices()[0].platform == "cpu":
            yield (
                f"note: on a CPU {method} weights are made float at every step, which is slow: w8a8 is what it multiplies fast"
            )

    def load(self) -> Llama:
        """Reads the weights to where they are computed with."""
        keep_compiled_programs()
        config, device = self.opened.config, jax.local_devices()[0]
        shared = dict(
            max_length=self.max_length,
            mesh=self.mesh,
            kernels=self.dtype == "float32" or choose_kernels(device, config.head_dim, note),
            cache_dtype=self.cache_dtype,
        )
        guesses = lookup(self.draft_tokens) if self.draft == LOOKUP else None
        if self.small:
            method = "" if stored_method(self.small) else self.quantize
            guesses = draft_model(self.small, self.dtype, method, self.draft_tokens, **shared)
        return Llama(
            config=config,
            params=load_laid_out(self.opened, DTYPES[self.dtype], mesh=self.mesh, quantize=self.quantize),
            tokenizer=self.tokenizer,
            chat_format=chat_format_of_weights(self.opened, self.tokenizer),
            batch_size=self.batch_size,
            guesses=guesses,
            **shared,
        )


def _check(max_length: int, cache_dtype: str, batch_size: int) -> None:
    if not 0 <= max_length <= 2**20:
        raise LlamaError(
            ExitCode.BAD_REQUEST, f"max_length is {max_length}, expected 1 to {2**20}, or 0 for the model's context"
        )
    check_cache_dtype(cache_dtype)
    if batch_size < 1:
        raise LlamaError(ExitCode.BAD_REQUEST, f"batch_size is {batch_size}, expected at least 1")


def compute_dtype(opened: Checkpoint | Source, dtype: str = "auto") -> str:
    """The dtype that weights are loaded in; "auto" as `load` has it.

    Raises:
        LlamaError: it is none of COMPUTE_DTYPES.
    """
    if dtype == "auto":
        return {"float16": "bfloat16", "float64": "float32"}.get(opened.dtype.name, opened.dtype.name)
    if dtype not in COMPUTE_DTYPES:
        raise LlamaError(ExitCode.BAD_REQUEST, f"dtype is {dtype!r}, expected auto or one of {', '.join(COMPUTE_DTYPES)}")
    return dtype


def check_cache_dtype(cache_dtype: str) -> None:
    """Raises LlamaError where there is no such cache."""
    if cache_dtype not in CACHE_DTYPES:
        raise LlamaError(
            ExitCode.BAD_REQUEST, f"cache_dtype is {cache_dtype!r}, expected auto (the compute dtype, set by dtype) or int8"
        )


def open_weights(path: epath.PathLike, adapter: epath.PathLike = "") -> Checkpoint | Source:
    """A checkpoint, or weights of somebody else's that have not been converted; with an adapter, what both are together.

    Args:
        path: of a model, or of a LoRA run, which says what its base is.
        adapter: "", or as for `load`.

    Raises:
        LlamaError: there is nothing, or an adapter belongs to another base.
    """
    if adapter:
        return _over(open_weights(path), adapter)
    try:
        checkpoint = Checkpoint.open(path)
    except LlamaError as error:
        if error.code != ExitCode.NOT_A_CHECKPOINT or "://" in str(path):
            raise
        try:
            source = open_source(Path(path))
        except LlamaError as found:
            if is_peft(path):
                raise LlamaError(
                    error.code, f"{path} is an adapter: give its base as the checkpoint, and it as adapter"
                ) from None
            raise (error if found.code == ExitCode.NO_WEIGHTS else found) from None
        for line in source.notes:
            note(line)
        return source
    return checkpoint if checkpoint.adapter is None else _over_its_base(checkpoint)


def _over(base: Checkpoint | Source, path: epath.PathLike) -> Checkpoint | Source:
    """A base with any adapter that fits; another base than it was trained on is worth a warning."""
    if is_peft(path):
        return adapted(base, read_peft(Path(path), base.config))
    checkpoint = Checkpoint.open(path)
    weights = stored_adapter(checkpoint)
    if wrong := check_base(checkpoint, base):
        note(f"warning: {wrong}")
    return adapted(base, weights, checkpoint)


def _over_its_base(checkpoint: Checkpoint) -> Checkpoint | Source:
    remedy = f"give the base as the checkpoint, and {checkpoint.path} as adapter"
    try:
        base = open_weights(checkpoint.adapter["base"])
    except LlamaError as error:
        raise LlamaError(
            error.code, f"{checkpoint.path} is an adapter, and its base is not there ({error}): {remedy}"
        ) from None
    if wrong := check_base(checkpoint, base):
        raise LlamaError(ExitCode.NOT_EQUAL, f"{wrong}, which was there: put that back, or {remedy}")
    return adapted(base, stored_adapter(checkpoint), checkpoint)


def tokenizer_of(opened: Checkpoint | Source, given: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer of a file or folder, or the weights' own; None where they have none.

    Raises:
        LlamaError: it has more tokens than the model.
    """
    if given:
        tokenizer = load_tokenizer(given)
    elif isinstance(opened, Source):
        beside = [file for file in opened.tokenizer if file.name in FILE_NAMES]
        tokenizer = load_tokenizer(beside[0].parent) if beside else None
    else:
        tokenizer = _stored_tokenizer(opened) if opened.tokenizer else None
    if tokenizer is not None and tokenizer.vocab_size > opened.config.vocab_size:
        raise LlamaError(
            ExitCode.VOCAB_MISMATCH,
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model {opened.config.vocab_size:,}: give its own",
        )
    return tokenizer


def chat_format_of_weights(opened: Checkpoint | Source, tokenizer: Tokenizer | None) -> str:
    """What the checkpoint says, or what the name of the weights and the tokenizer's template tell; "" for a base model."""
    if isinstance(opened, Checkpoint):
        return opened.chat_format
    return chat_format_of(opened.name, tokenizer.chat_template if tokenizer else None, tokenizer)


def _mesh(cfg: ModelConfig, wanted: MeshShape | Mapping[str, int] | None) -> Mesh | None:
    if wanted is None:
        return None
    if not isinstance(wanted, MeshShape | Mapping):
        raise LlamaError(ExitCode.BAD_MESH, f"mesh is {type(wanted).__name__}, expected sizes, e.g. {{'tensor': 8}}")
    if not isinstance(wanted, MeshShape):
        known = [field.name for field in dataclasses.fields(MeshShape)]
        if unknown := [str(name) for name in wanted if name not in known]:
            raise LlamaError(ExitCode.BAD_MESH, f"no such mesh axis: {', '.join(unknown)}; there are {', '.join(known)}")
        for name, size in wanted.items():
            if type(size) is not int:
                raise LlamaError(ExitCode.BAD_MESH, f"mesh.{name} is {size!r}, expected a whole number")
        wanted = MeshShape(**wanted)
    shape = resolve_mesh(cfg, wanted, jax.device_count())
    if wanted.tensor == -1 and shape.data > wanted.data:
        note(f"note: tensor={shape.tensor} is the most this model allows; the other devices hold copies: {shape}")
    return None if shape.num_devices == 1 else make_mesh(shape)


def _stored_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's own, whose files may lie in a bucket."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in checkpoint.tokenizer:
            (Path(scratch) / name).write_bytes((checkpoint.path / name).read_bytes())
        return load_tokenizer(Path(scratch))


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, unless the user has chosen a place or turned it off."""
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(CACHE_DIR))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
