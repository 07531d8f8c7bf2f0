"""What the programs of this room share: flags to a loaded model."""

from collections.abc import Callable
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from llama_jax import distributed
from llama_jax.errors import ExitCode, LlamaError, run_command

COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where several processes meet (found on pods)")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", -1, "how many there are; each runs the same command (found on pods)")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "which of them this is, from 0 (found on pods)")


def define_config() -> flags.FlagHolder:
    holder = config_flags.DEFINE_config_file("config", help_string="configuration file, with --config.KEY=VALUE to change it")
    flags.mark_flag_as_required("config")
    return holder


def run(main: Callable[[], None]) -> None:
    """Parses flags and runs main, in every process of a job; what a user got wrong is one line on stderr."""

    def checked(argv: list[str]) -> None:
        if len(argv) > 1:
            raise LlamaError(
                ExitCode.BAD_REQUEST, f"unexpected argument {argv[1]!r}: prompts go in --prompt, files in their flags"
            )
        with distributed.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value):
            _share(flags.FLAGS.config)
            main()

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            flags.FLAGS.config.to_dict()  # a file that is missing or does not run is only found when it is read
            return rest
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            said = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
            if "Did you mean" in said:  # a KeyError of ml_collections, quoted twice
                said = "unknown key " + said.replace("'", "").replace(" Did you", ". Did you")
            raise LlamaError(ExitCode.BAD_REQUEST, f"{said} (--help lists the flags, the config file its keys)") from None

    logging.set_verbosity(logging.WARNING)
    run_command(lambda: app.run(checked, flags_parser=parse))


def load(config: ml_collections.ConfigDict) -> Any:
    """The model that a program's config names."""
    import llama_jax

    if not config.checkpoint:
        raise LlamaError(ExitCode.BAD_REQUEST, "no checkpoint: --config.checkpoint=DIR names one that llama_jax.convert made")
    more = {"batch_size": config.batch_size} if "batch_size" in config else {}
    return llama_jax.load(
        config.checkpoint,
        mesh=config.mesh.to_dict(),
        dtype=config.dtype,
        quantize=config.quantize,
        max_length=config.max_length,
        tokenizer=config.tokenizer,
        **more,
    )


def settings(config: ml_collections.ConfigDict) -> Any:
    """The Settings of a program's config."""
    import llama_jax

    values = config.sampling.to_dict()
    values["logit_bias"] = _parse_bias(values["logit_bias"])
    return llama_jax.Settings(max_new_tokens=config.max_new_tokens, **values)


def _share(config: ml_collections.ConfigDict) -> None:
    """Process 0's settings are everybody's: processes that differ in one would wait for each other for ever."""
    shared = distributed.broadcast(config.to_dict())
    if not distributed.is_main():
        config.update(shared)


def _parse_bias(text: str) -> dict[int, float]:
    try:
        pairs = (pair.split(":") for pair in text.split(",") if pair.strip())
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise LlamaError(ExitCode.BAD_REQUEST, f"logit_bias is {text!r}, expected ID:BIAS,ID:BIAS") from None
