"""What infer.bench's lines say to a reader: what has changed since other lines, and a plot."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import ExitCode, LlamaError

Line = Mapping[str, Any]
SAME = ("model_parameters", "dtype", "quantize", "cache_dtype", "mesh", "batch", "prompt_length", "context", "device")
COMPARED = (
    ("prefill tok/s", "prefill_tokens_per_second"),
    ("share", "prefill_share"),
    ("decode tok/s", "tokens_per_second"),
    ("share", "decode_share"),
)


def read_lines(path: str) -> list[Line]:
    """The lines of a file.

    Raises:
        LlamaError: it is not there, or not what infer.bench prints.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = [_complete(json.loads(line)) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise LlamaError(ExitCode.BAD_REQUEST, f"{path}: {error}: --compare reads what infer.bench printed") from None
    wanted = {*SAME, *(key for _, key in COMPARED)}
    if bad := [line for line in lines if not isinstance(line, dict) or not wanted <= line.keys()]:
        raise LlamaError(ExitCode.BAD_REQUEST, f"{path}: {str(bad[0])[:80]!r} is no line of infer.bench's")
    return lines


def _complete(line: Any) -> Any:
    """Lines of before there was a choice of caches do not name theirs."""
    return {"cache_dtype": "auto"} | line if isinstance(line, dict) else line


def compare(before: Sequence[Line], after: Sequence[Line]) -> str:
    """A table of rates and shares, new over old, of the lines that measure the same thing."""
    known = {_key(line): line for line in before}
    rows = ["  ".join([f"{'batch':>5}", *(f"{name:>28}" for name, _ in COMPARED)])]
    for line in after:
        if (old := known.get(_key(line))) is None:
            rows.append(f"{line['batch']:>5}  not in the other file (same model, dtype, mesh, lengths and device)")
            continue
        cells = (_change(old[key], line[key]) for _, key in COMPARED)
        rows.append("  ".join([f"{line['batch']:>5}", *(f"{cell:>28}" for cell in cells)]))
    return "\n".join(rows)


def plot(lines: Sequence[Line], path: str) -> None:
    """Tokens/s of decoding against batch size, under what the measured floors allow, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    batches = [line["batch"] for line in lines]
    axes.plot(batches, [line["tokens_per_second"] for line in lines], "o-", label="decode, measured")
    axes.plot(
        batches, [roof(line) for line in lines], "--", color="grey", label="floor: reading weights and cache, or products"
    )
    axes.set(xscale="log", yscale="log", xlabel="sequences in a batch", ylabel="tokens/s", xticks=batches)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    first = lines[0]
    weights = first["quantize"] or first["dtype"]
    axes.set_title(f"{first['model_parameters'] / 1e9:.2f} B parameters, {weights}, {first['device']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def roof(line: Line) -> float:
    """Tokens/s if a step took no longer than its bytes, or its products, at the measured rates."""
    rate = line["floors"]["matmul_flops_per_second"]["int8" if line["quantize"] == "w8a8" else line["dtype"]]
    devices = 1
    for size in line["mesh"].values():
        devices *= size
    multiplying = 2 * line["model_parameters"] * line["batch"] / devices / rate
    return line["batch"] / max(line["floor_seconds"], multiplying)


def _key(line: Line) -> str:
    return json.dumps([line[name] for name in SAME], sort_keys=True)


def _change(old: float, new: float) -> str:
    return f"{old:.3g} -> {new:.3g} ({new / old:.2f}x)"
