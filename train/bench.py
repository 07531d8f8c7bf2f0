"""How fast a training step is, and where its time goes.

    python -m train.bench --config=configs/train_bench.py:stories110m

Prints one JSON object. The matrix products of the model's shapes (forward, and both of the backward pass) are timed alone in
the same process, so that shares can be compared across machines: `products_share` is their seconds over those of a step,
`forward_share` that of three forward products. Batches come as those of train.main do: `input_seconds` is what a step waits for
its own, `input_work_seconds` what it takes to make one and put it on the devices when none is made ahead. On a device that the
planner knows there is MFU by its published peak, too (train.flops).
"""

import json

from llama_jax import program

CONFIG = program.define_config()


def main() -> None:
    from train.host_memory import keep_freed_memory
    from train.measure import measure

    keep_freed_memory()
    print(json.dumps(measure(CONFIG.value.to_dict())))


if __name__ == "__main__":
    program.run(main)
