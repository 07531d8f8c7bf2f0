"""The page docs/bundled_model.md, written from the figures of `judge.py`."""

import json
from collections.abc import Mapping, Sequence

from bundled.measure import FAULTS, Figures

HEAD = """# The bundled model, judged

Written by `{command}`; nothing here is edited by hand. How it is made: [bundled/](../bundled/README.md).

A Llama 2 architecture of {parameters:,} parameters in bfloat16: width {embed_dim}, {num_layers} layers, {num_heads} heads \
with {num_kv_heads} key/value heads, MLP width {mlp_dim}, vocabulary {vocab_size:,}, context {max_length}. It has read nothing \
but what the repository's own generator writes, so it can speak of nothing else."""

PERPLEXITY = """## Perplexity on held-out stories

Per token, on {stories} stories ({tokens:,} tokens) of seeds that training does not use; beginning given, end counted.

| | perplexity |
|---|---|
| trigram model (interpolated Kneser-Ney, {ngram_stories:,} training stories) | {trigram:.3f} |
| 5-gram model, likewise | {fivegram:.3f} |
| **this model** | **{model:.3f}** |
| the generator itself | {generator:.3f} |

The generator counts the probability of every choice it makes: {generator_nats:.1f} nats for one of these stories, where the \
model needs {model_nats:.1f}. The mean over all stories is the entropy of the choices. It bounds the entropy of the stories \
from above, and equals it if different choices always tell different stories; then no model can be better in the long run. So \
the {excess:.1f} nats between the two are what the model has not learnt."""


def page(figures: Figures, command: str) -> str:
    """docs/bundled_model.md; command: what wrote it."""
    blocks = [
        HEAD.format(command=command, parameters=figures["parameters"], **figures["config"]),
        *(_training(figures["training"]) if figures["training"] else []),
        _perplexity(figures["perplexities"]),
        _answers(figures["answers"]),
        _consistency(figures["names"], figures["requests"]),
        "## Ten samples, as they came",
        *(f"`make sample PROMPT={json.dumps(prompt)}`\n\n{_quoted(text)}" for prompt, text in figures["completions"]),
        *(f"`make chat`\n\n{_conversation(said)}" for said in figures["conversations"]),
    ]
    return "\n\n".join(blocks) + "\n"


def _perplexity(found: Figures) -> str:
    values, nats = found["perplexity"], found["nats_per_story"]
    return PERPLEXITY.format(
        trigram=values["3-gram"],
        fivegram=values["5-gram"],
        model=values["model"],
        generator=values["generator"],
        generator_nats=nats["generator"],
        model_nats=nats["model"],
        excess=nats["model"] - nats["generator"],
        **{name: found[name] for name in ("stories", "tokens", "ngram_stories")},
    )


def _answers(found: Mapping[str, Figures]) -> str:
    rows = []
    for kind, one in found.items():
        guess = "" if one["by_guessing"] is None else f"{one['by_guessing']:.0%}"
        wrong = ""
        if one["a_wrong_one"]:
            text, answer, reply = one["a_wrong_one"]
            wrong = f"{_cell(text)} *{_cell(reply)}* ({_cell(answer)})"
        rows.append(f"| {kind} | {one['right']} of {one['asked']} | {one['right'] / one['asked']:.0%} | {guess} | {wrong} |")
    right, asked = (sum(one[name] for one in found.values()) for name in ("right", "asked"))
    head = (
        "## Held-out questions\n\nAsked in the chat format, answered greedily, checked by a program. None of them is in the "
        "training data: sums, differences and comparisons with these numbers are not, in any words or order; of what is known "
        "by heart (calendar, opposite, sound) this wording is not.\n\n"
        "| kind | right | | by guessing | the first wrong answer (right one) |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + f"\n| **all** | **{right} of {asked}** | **{right / asked:.0%}** | | |"


def _consistency(names: Figures, requests: Figures) -> str:
    faults = ", ".join(f"{fault} {names[fault]}" for fault in FAULTS)
    return (
        f"## Does it look back?\n\nOf {names['sampled']} stories sampled as `make sample` does (temperature 0.6, top-p 0.9), "
        f"**{names['consistent']}** keep to their names: two people, the hero named again, only the hero's pronouns, nobody of "
        f"two kinds. Faults: {faults}. {names['different_texts']} of the stories differ, and {names['different_heroes']} names "
        f"of heroes come up.\n\nOf {requests['asked']} requests in the chat format for a story about somebody or something, "
        f"{requests['met']} got a story with all that was asked for, {requests['met_and_consistent']} of them consistent."
    )


def _training(runs: Sequence[Figures]) -> list[str]:
    head = "## Training\n\n| run | steps | tokens | loss at the end | time in steps |\n|---|---|---|---|---|\n"
    rows = [
        f"| {r['run']} | {r['steps']:,} | {r['tokens'] / 1e6:.1f} M | {r['loss']:.3f} | {r['seconds'] / 60:.1f} min |"
        for r in runs
    ]
    return [head + "\n".join(rows)]


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}  " for line in text.split("\n"))


def _conversation(said: Sequence[Mapping[str, str]]) -> str:
    names = {"system": "System", "user": "You", "assistant": "Model"}
    return "\n>\n".join(_quoted(f"**{names[message['role']]}:** {message['content']}") for message in said)


def _cell(text: str) -> str:
    """The last 120 characters, fit for a table."""
    text = text.replace("\n", " ").replace("|", "\\|")
    return text if len(text) <= 120 else f"... {text[-120:]}"
