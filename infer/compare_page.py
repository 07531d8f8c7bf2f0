"""infer.compare's report: one HTML file that needs nothing else. All text of models and users is escaped."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from infer.compare_plots import histogram, kl_by_position
from infer.compare_style import STYLE
from infer.comparison import Comparison, Fork, Sample
from infer.divergence import Position
from llama_jax.text.tokenizer import Tokenizer

BEFORE, AFTER = 32, 12  # tokens of context around one
NEWLINE = "\n"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # which HTML has no place for
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
"""
FACTS = (
    ("checkpoint", "checkpoint"),
    ("adapter", "adapter"),
    ("base", "base"),
    ("parameters", "parameters"),
    ("shape", "shape"),
    ("vocabulary", "vocabulary"),
    ("context", "context"),
    ("dtype", "dtype"),
    ("quantize", "quantised"),
    ("cache_dtype", "cache"),
    ("bytes", "bytes in memory"),
    ("source", "source"),
    ("made_by", "made by"),
)


def page(comparison: Comparison, tokenizer: Tokenizer) -> str:
    title = " and ".join(_name(facts) for facts in comparison.facts)
    settings = comparison.settings
    blocks = [
        HEAD.format(title=_text(title), style=STYLE),
        "<h1>"
        + " ".join(f"<span>{_badge(m)} {_text(_name(one))}</span>" for m, one in zip("ab", comparison.facts, strict=True))
        + "</h1>",
        _tiles(comparison.divergence.summary()),
        _models(comparison.facts),
        _measured(comparison),
        "<h2>Samples</h2>",
        '<p class="note">What both make of a prompt, greedily and sampled '
        f"(temperature {settings.temperature:g}, top-p {settings.top_p:g}, seed {settings.seed}). The first token that differs "
        "is marked; probabilities are the models' own, before temperature and the other settings.</p>",
        *(_pair(tokenizer, pair, fork) for pair, fork in zip(comparison.samples, comparison.forks, strict=True)),
        "<h2>Where they differ most</h2>",
        '<p class="note">The tokens of the text with the largest KL divergence, marked in their context, and what each model '
        "finds likeliest there.</p>",
        *_largest(comparison, tokenizer),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(blocks)


def _name(facts: dict[str, Any]) -> str:
    """A model in a few words: the end of its path, and how it is rounded."""
    parts = facts["checkpoint"].rstrip("/").split("/")
    path = "/".join(parts[-3:] if parts[-2:-1] == ["checkpoints"] else parts[-2:])  # RUN/checkpoints/STEP
    cache = "" if facts["cache_dtype"] == "auto" else f"{facts['cache_dtype']} cache"
    more = [facts["adapter"] and "adapter", facts["quantize"] or facts["dtype"], cache]
    return ", ".join(filter(None, [path, *more]))


def _tiles(numbers: dict[str, float]) -> str:
    tiles = [
        ("perplexity of a", f"{numbers['perplexity_a']:.5g}"),
        ("perplexity of b", f"{numbers['perplexity_b']:.5g}"),
        ("mean KL, nats", f"{numbers['kl_mean']:.2e}"),
        ("same likeliest token", f"{numbers['same_argmax']:.1%}"),
    ]
    return '<div class="tiles">' + "".join(f"<div><strong>{v}</strong><span>{k}</span></div>" for k, v in tiles) + "</div>"


def _models(facts: Sequence[dict[str, Any]]) -> str:
    shown = [_shown(one) for one in facts]
    rows = [
        f"<tr{'' if shown[0][key] == shown[1][key] else ' class=differs'}><th>{label}</th>"
        + "".join(f"<td>{_text(one[key]) or '-'}</td>" for one in shown)
        + "</tr>"
        for key, label in FACTS
        if any(one[key] for one in shown)
    ]
    head = "<tr><th></th>" + "".join(f"<th>{_badge(model)}</th>" for model in "ab") + "</tr>"
    return f'<h2>Models</h2>\n<table class="models">{head}\n' + "\n".join(rows) + "\n</table>"


def _shown(facts: dict[str, Any]) -> dict[str, str]:
    heads = f"{facts['heads']} heads" + (f" ({facts['kv_heads']} of keys)" if facts["kv_heads"] != facts["heads"] else "")
    shape = {"shape": f"{facts['layers']} layers, width {facts['width']:,}, {heads}", "quantize": facts["quantize"] or "no"}
    return {key: f"{value:,}" if isinstance(value, int) else value for key, value in facts.items()} | shape


def _measured(comparison: Comparison) -> str:
    found, numbers = comparison.divergence, comparison.divergence.summary()
    begins = np.cumsum([0, *(len(row) - 1 for _, row in comparison.texts[:-1])]).tolist()
    names = [name for name, _ in comparison.texts]
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
    rows = [
        ("perplexity of a, of b", f"{numbers['perplexity_a']:.5g}, {numbers['perplexity_b']:.5g}"),
        ("KL(a || b): mean", f"{numbers['kl_mean']:.3e} nats"),
        ("median", f"{numbers['kl_median']:.3e}"),
        ("99th percentile", f"{numbers['kl_p99']:.3e}"),
        ("maximum", f"{numbers['kl_max']:.3e}"),
        ("same likeliest token", f"{numbers['same_argmax']:.2%} of the positions"),
    ]
    own = " What a wrote is likelier to a for that alone: give --text to compare perplexities."
    return (
        f'<h2>On the text</h2>\n<p class="note">{numbers["tokens"]:,} tokens of {_text(listed)}.'
        f"{own if comparison.texts_of_a else ''}</p>\n"
        + "<table>" + "".join(f"<tr><th>{k}</th><td>{v}</td></tr>" for k, v in rows) + "</table>\n"
        f'<div class="plots"><figure>{kl_by_position(found.kl, begins)}</figure>'
        f"<figure>{histogram(found.logprobs_b - found.logprobs_a)}</figure></div>"
    )  # fmt: skip


def _pair(tokenizer: Tokenizer, pair: "tuple[Sample, Sample]", fork: Fork | None) -> str:
    columns = [
        f'<div>{_badge(model)}<div class="text">{_sample(tokenizer, sample, fork.at if fork else None)}</div></div>'
        for model, sample in zip("ab", pair, strict=True)
    ]
    said = _fork(tokenizer, fork) if fork else f"<p>Equal: {len(pair[0].tokens):,} tokens.</p>"
    return f'<section><h3>{pair[0].kind}</h3><div class="pair">{"".join(columns)}</div>{said}</section>'


def _sample(tokenizer: Tokenizer, sample: Sample, at: int | None) -> str:
    """A prompt and its continuation, with token `at` marked."""
    prompt = f'<span class="prompt">{_text(tokenizer.decode(sample.prompt))}</span>'
    stream = tokenizer.stream(continued=any(token not in tokenizer.special_ids for token in sample.prompt))
    pieces = [stream.push([token]) for token in sample.tokens]
    tail = stream.finish()
    if at is None:
        return prompt + _text("".join(pieces) + tail)
    marked = _mark(pieces[at], sample.tokens[at]) if at < len(pieces) else "<mark>the end</mark>"
    return prompt + _text("".join(pieces[:at])) + marked + _text("".join(pieces[at + 1 :]) + tail)


def _fork(tokenizer: Tokenizer, fork: Fork) -> str:
    names = ["the end" if token is None else _token(tokenizer, token) for token in fork.tokens]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{_badge(model)} gives</th>" + "".join(f"<td>{_percent(p)}</td>" for p in both) + "</tr>"
        for model, both in zip("ab", fork.probabilities, strict=True)
    )
    return f"<p>Equal for {fork.at:,} tokens, then:</p><table><tr><th></th>{head}</tr>{rows}</table>"


def _largest(comparison: Comparison, tokenizer: Tokenizer) -> list[str]:
    places = [(name, row, at) for name, row in comparison.texts for at in range(1, len(row))]
    return [_position(comparison, tokenizer, position, *places[position.place]) for position in comparison.divergence.largest]


def _position(comparison: Comparison, tokenizer: Tokenizer, position: Position, name: str, row: list[int], at: int) -> str:
    found = comparison.divergence
    before = tokenizer.decode(row[max(0, at - BEFORE) : at], continued=at > BEFORE)
    after = tokenizer.decode(row[at + 1 : at + 1 + AFTER], continued=True).rstrip()
    marked = _mark(tokenizer.decode([row[at]], continued=True), row[at])
    lines = []
    for model, best, own in (
        ("a", position.likeliest_a, found.logprobs_a[position.place]),
        ("b", position.likeliest_b, found.logprobs_b[position.place]),
    ):
        likely = ", ".join(f"{_token(tokenizer, token)} {_percent(p)}" for token, p in best)
        lines.append(f"<p>{_badge(model)} {likely}; the marked one {_percent(float(np.exp(own)))}</p>")
    cut = "…" if at > BEFORE else ""
    return (
        f"<section><h3>KL {found.kl[position.place]:.3g} nats <span>token {at:,} of {_text(name)}</span></h3>"
        f'<div class="text">{cut}{_text(before)}{marked}{_text(after)}</div>{"".join(lines)}</section>'
    )


def _mark(piece: str, token: int) -> str:
    """A token in its text. What shows nothing shows its sign, or its id."""
    return f"<mark>{_text(piece.replace(NEWLINE, '↵' + NEWLINE)) or f'#{token}'}</mark>"


def _token(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself."""
    piece = tokenizer.decode([token], continued=True, skip_special=False)
    piece = piece.replace(NEWLINE, "↵") if piece.strip(" ") else piece.replace(" ", "␣")
    return f"<code>{_text(piece) or f'#{token}'}</code>"


def _badge(model: str) -> str:
    return f'<b class="{model}">{model}</b>'


def _text(text: str) -> str:
    return escape(CONTROLS.sub("\ufffd", text))


def _percent(p: float) -> str:
    return f"{p:.2%}" if p >= 0.001 else f"{p:.0e}"
