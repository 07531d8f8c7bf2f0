#!/usr/bin/env bash
# The bundled model on one GPU, in minutes: bundled/on_gpu.sh, or its parts one by one: data, pretrain, sft, publish.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=build/bundled

data() {
    "$python" -m bundled.make_data --output $folder/data --stories 500000 --exercises 300000 --dialogues 300000
    for stage in pretrain sft; do
        "$python" -m llama_jax.data.prepare --source $folder/data/$stage.jsonl --tokenizer $folder/data/tokenizer.model \
            --chat-format llama2 --output $folder/data/$stage-tokens
    done
}

train() {
    "$python" -m train.main --config=configs/bundled.py:"$1"_gpu --workdir=$folder/"$1" \
        --config.data.train=$folder/data/"$1"-tokens --config.eval.every=1000
}

pretrain() {
    train pretrain
}

sft() {
    train sft
}

publish() {
    "$python" -m bundled.publish --run $folder/sft --output $folder/checkpoint --overwrite
}

[ $# -gt 0 ] || set -- data pretrain sft publish
for part in "$@"; do
    "$part"
done
