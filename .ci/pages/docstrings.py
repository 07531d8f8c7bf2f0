"""Names, signatures and docstrings of the sources, read and not imported: the same under every Python."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.compile(r"^(Attributes|Args|Returns|Raises):$", re.MULTILINE)
Definition = ast.FunctionDef | ast.ClassDef


def definition(module: str, name: str) -> Definition:
    """The function or class `name` of a file such as `llama_jax/config.py`."""
    tree = ast.parse((ROOT / module).read_text())
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return node
    raise LookupError(f"{module} has no {name}")


def sections(node: Definition) -> dict[str, str]:
    """A docstring as "" (what comes first) and its sections by name."""
    first, *rest = SECTION.split(ast.get_docstring(node) or "")
    return {"": first.strip()} | dict(zip(rest[::2], map(_outdent, rest[1::2]), strict=True))


def entries(section: str) -> dict[tuple[str, ...], str]:
    """`name: text` or `name, name: text` of a section, continuation lines joined."""
    found: dict[tuple[str, ...], str] = {}
    names: tuple[str, ...] = ()
    for line in section.splitlines():
        if line[:1].strip():
            head, _, text = line.partition(": ")
            names = tuple(name.strip() for name in head.split(","))
            found[names] = text.strip()
        elif line.strip():
            found[names] += " " + line.strip()
    return {names: text.removesuffix(",") for names, text in found.items()}


def meanings(node: ast.ClassDef) -> dict[str, str]:
    """Of a dataclass: attribute -> what its docstring says of it; `embed_dim, head_dim: D, H.` says each one's letter."""
    found: dict[str, str] = {}
    for names, text in entries(sections(node).get("Attributes", "")).items():
        letters = text.rstrip(".").split(", ")
        own = len(letters) == len(names) and all(len(letter) == 1 for letter in letters)
        found |= zip(names, letters if own else [text] * len(names), strict=True)
    return found


def fields(node: ast.ClassDef) -> dict[str, tuple[str, str]]:
    """Of a dataclass: name -> (type, default or ""), as they are written."""
    return {
        line.target.id: (ast.unparse(line.annotation), ast.unparse(line.value) if line.value else "")
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def _outdent(text: str) -> str:
    lines = text.strip("\n").splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:] for line in lines).strip()
