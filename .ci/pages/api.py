"""docs/api.md, from signatures and docstrings."""

import ast

from pages.docstrings import ROOT, Definition, definition, entries, fields, sections

TITLE = """# Python API

Written by `python .ci/docs.py write` from the docstrings; nothing here is edited by hand. Arrays have one letter an axis: B
sequences, T positions, V vocabulary, D width ([all of them](../CONTRIBUTING.md#habits)).
"""
ROOMS = {
    "Generating": (
        "`import llama_jax` has these names, and imports jax at the first call.",
        [
            ("llama_jax/generation/load.py", "load", "llama_jax."),
            ("llama_jax/generation/llama.py", "Llama", "llama_jax."),
            ("llama_jax/generation/request.py", "Settings", "llama_jax."),
            ("llama_jax/generation/answer.py", "Completion", "llama_jax."),
            ("llama_jax/generation/llama.py", "Session", "llama_jax."),
            ("llama_jax/errors.py", "LlamaError", "llama_jax."),
        ],
    ),
    "Weights": (
        "What the commands of the same names call.",
        [
            ("llama_jax/commands/convert.py", "convert", "llama_jax.commands.convert."),
            ("llama_jax/commands/verify.py", "verify", "llama_jax.commands.verify."),
            ("llama_jax/commands/export.py", "export", "llama_jax.commands.export."),
            ("llama_jax/commands/quantize.py", "quantize", "llama_jax.commands.quantize."),
            ("llama_jax/checkpoint/source.py", "open_source", "llama_jax.checkpoint.source."),
            ("llama_jax/checkpoint/store.py", "Checkpoint", "llama_jax.checkpoint.store."),
        ],
    ),
    "The model": (
        "Parameters are nested dicts of arrays ([the tree](design.md#parameters)).",
        [
            ("llama_jax/config.py", "ModelConfig", "llama_jax.config."),
            ("llama_jax/mesh.py", "MeshShape", "llama_jax.mesh."),
            ("llama_jax/model/stack.py", "forward", "llama_jax.model."),
            ("llama_jax/model/stack.py", "logits", "llama_jax.model."),
            ("llama_jax/model/lora.py", "LoraConfig", "llama_jax.model.lora."),
        ],
    ),
    "Training": (
        "What `train.main` is made of.",
        [
            ("llama_jax/training/step.py", "StepConfig", "llama_jax.training.step."),
            ("llama_jax/training/step.py", "make_train_step", "llama_jax.training.step."),
            ("llama_jax/training/optimizer.py", "OptimizerConfig", "llama_jax.training.optimizer."),
            ("llama_jax/training/state.py", "TrainState", "llama_jax.training.state."),
        ],
    ),
}


def page() -> str:
    parts = [TITLE]
    for room, (says, names) in ROOMS.items():
        parts.append(f"## {room}\n{says}\n")
        for module, name, prefix in names:
            parts += _entry(definition(module, name), prefix, "###")
    parts.append(_exit_codes())
    return "\n".join(parts)


def _entry(node: Definition, prefix: str, level: str) -> list[str]:
    """Heading, signature, docstring; of a class its public methods, too."""
    lines = [f"{level} {prefix}{node.name}", f"```py\n{_signature(node)}\n```", _described(node)]
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and ast.get_docstring(method):
                lines += _entry(method, f"{prefix}{node.name}.", level + "#")
    return [line for line in lines if line]


def _signature(node: Definition) -> str:
    if isinstance(node, ast.FunctionDef):
        if any(isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list):
            return f"{node.name}: {ast.unparse(node.returns)}"
        return _call(node.name, _arguments(node.args), f" -> {ast.unparse(node.returns)}" if node.returns else "")
    if own := fields(node):
        arguments = [f"{name}: {kind}" + (f" = {default}" if default else "") for name, (kind, default) in own.items()]
        return _call(node.name, arguments)
    made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    return _call(node.name, _arguments(made[0].args) if made else [])


def _call(name: str, arguments: list[str], returned: str = "") -> str:
    line = f"{name}({', '.join(arguments)}){returned}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){returned}"


def _arguments(given: ast.arguments) -> list[str]:
    """As written, without self."""
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    said = [
        _argument(each, default) for each, default in zip(positional, defaults, strict=True) if each.arg not in ("self", "cls")
    ]
    if given.vararg:
        said.append(f"*{_argument(given.vararg)}")
    elif given.kwonlyargs:
        said.append("*")
    said += [_argument(each, default) for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return said + ([f"**{_argument(given.kwarg)}"] if given.kwarg else [])


def _argument(each: ast.arg, default: ast.expr | None = None) -> str:
    kind = f": {ast.unparse(each.annotation)}" if each.annotation else ""
    return f"{each.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def _described(node: Definition) -> str:
    """A docstring as Markdown: lists for arguments and attributes."""
    found = sections(node)
    parts = [_escaped(found.pop(""))]
    for name, text in found.items():
        if name in ("Args", "Attributes"):
            listed = "\n".join(f"- `{'`, `'.join(names)}`: {_escaped(says)}" for names, says in entries(text).items())
            parts.append(f"**{name}**\n\n{listed}")
        else:
            parts.append(f"**{name}**: {_escaped(' '.join(text.split()))}")
    return "\n\n".join(filter(None, parts)) + "\n"


def _escaped(text: str) -> str:
    """Shapes are not links, stars not emphasis; what is indented stays as it is written."""
    lines = [line if line.startswith("    ") else line.replace("*", r"\*").replace("<", "&lt;") for line in text.splitlines()]
    return "\n".join(lines).replace("](", "] (")


def _exit_codes() -> str:
    node = definition("llama_jax/errors.py", "ExitCode")
    source = (ROOT / "llama_jax/errors.py").read_text().splitlines()
    rows = []
    for line in node.body:
        if isinstance(line, ast.Assign):
            _, _, comment = source[line.lineno - 1].partition("# ")
            name = line.targets[0].id
            rows.append(f"| {ast.literal_eval(line.value)} | `{name}` | {comment or name.replace('_', ' ').lower()} |")
    return f"## Exit codes\n{sections(node)['']}\n\n| code | name | |\n|---|---|---|\n" + "\n".join(rows) + "\n"
