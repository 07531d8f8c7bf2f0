"""What every program shares: flags, a config file, a place in a job of several processes."""

from collections.abc import Callable

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
                ExitCode.BAD_REQUEST, f"unexpected argument {argv[1]!r}: prompts go in --prompt, files in their flags (--help)"
            )
        with distributed.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value):
            _share(flags.FLAGS.config)
            main()

    def parse(argv: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
            flags.FLAGS.config.to_dict()  # a file that is missing or does not run is only found when it is read
            return rest
        except BrokenPipeError:  # `--help | head`
            raise
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            said = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
            if "Did you mean" in said or said.startswith("\"'"):  # a KeyError of ml_collections, quoted twice
                said = "unknown key " + said.replace("'", "").strip('"').replace(" Did you", ". Did you")
            if "get_config() takes 0 positional arguments" in said:  # the end of a traceback
                said = (
                    said.partition(": Error whilst")[0] + ": this file has no presets, leave out the colon and what follows it"
                )
            raise LlamaError(ExitCode.BAD_REQUEST, f"{said} (--help lists the flags, the config file its keys)") from None

    logging.set_verbosity(logging.WARNING)
    run_command(lambda: app.run(checked, flags_parser=parse))


def _share(config: ml_collections.ConfigDict) -> None:
    """Process 0's settings are everybody's: processes that differ in one would wait for each other for ever."""
    shared = distributed.broadcast(config.to_dict())
    if not distributed.is_main():
        config.update(shared)
