"""Runs the notebooks from top to bottom on a CPU, in a copy of the checkout, and compares them with what is committed.

    python .ci/notebooks.py [NAME ...]           compares, and fails where they differ
    python .ci/notebooks.py --write [NAME ...]   stores this run's outputs, shared cells and badges

Compared are the code, with shared cells and badges as notebooks/setup_cells.py says, and what was printed; pictures are drawn
anew, and only their presence counts. What goes to stderr (progress, notes, times) is no part of a notebook.
Needs an environment with requirements-notebooks.txt: `make notebooks` makes it.
"""

import argparse
import copy
import difflib
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from checkout import ROOT, copy_checkout
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = ROOT / "notebooks"
MOST_BYTES = 400_000
CELL_SECONDS = 300
TYPES = ("text/plain", "text/markdown", "image/png")  # of outputs, that are kept
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def shared_cells() -> dict[str, str]:
    """The code of the cells that all notebooks have, by their ids."""
    _, *parts = re.split(r"^# %% (\w+)\n", (FOLDER / "setup_cells.py").read_text(), flags=re.MULTILINE)
    return {name: code.strip() for name, code in zip(parts[::2], parts[1::2], strict=True)}


def badge(name: str) -> str:
    repository = re.search(r'^REPOSITORY = "(.*)"', (FOLDER / "setup_cells.py").read_text(), re.MULTILINE)[1]
    where = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({where})"


def with_shared(notebook: NotebookNode, name: str) -> NotebookNode:
    """The notebook with its badge (the first line of the first cell), shared cells and metadata as they should be."""
    notebook = copy.deepcopy(notebook)
    first, code = notebook.cells[0], shared_cells()
    first.source = "\n".join([badge(name), *first.source.split("\n")[1:]])
    ids = [cell.id for cell in notebook.cells if cell.id in code]
    if ids != list(code):
        sys.exit(f"{name}.ipynb has the shared cells {ids}, expected {list(code)}: give cells these ids, in this order")
    for cell in notebook.cells:
        cell.source = code.get(cell.id, cell.source)
        cell.metadata = {"cellView": "form"} if cell.id in code else {}
        if cell.cell_type == "code":
            cell.execution_count = None
    notebook.metadata = METADATA
    return notebook


def kept(outputs: list[NotebookNode]) -> list[dict[str, Any]]:
    """Outputs without stderr and counts; printed pieces joined."""
    found = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if found and found[-1]["output_type"] == "stream":
                found[-1]["text"] += output.text
            else:
                found.append({"output_type": "stream", "name": "stdout", "text": output.text})
            continue
        data = {kind: output.data[kind] for kind in TYPES if kind in output.data}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    return found


def said(notebook: NotebookNode) -> list[str]:
    """Lines of the code and of what it printed; of a picture that there is one."""
    lines = []
    for cell in notebook.cells:
        lines += [f"[{cell.id}]", *cell.source.split("\n")]
        for output in cell.get("outputs", ()):
            data = output.get("data", {"stdout": output.get("text", "")})
            for kind, text in sorted(data.items()):
                lines += [f"-> {kind}", *("" if kind.startswith("image/") else text).rstrip("\n").split("\n")]
    return lines


def executed(notebook: NotebookNode, name: str, folder: Path) -> NotebookNode:
    """The notebook with the outputs of a run in `folder`."""
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", record_timing=False, resources=where).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.from_dict(output) for output in kept(cell.outputs)]
    return with_shared(notebook, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="sample, finetune, ...; all when none is given")
    parser.add_argument("--write", action="store_true", help="store outputs and shared cells")
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    wrong = False
    for name in args.names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        committed = nbformat.read(path, as_version=4)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            copy_checkout(Path(scratch))
            done = executed(with_shared(committed, name), name, Path(scratch) / "notebooks")
        nbformat.validate(done)
        difference = list(difflib.unified_diff(said(committed), said(done), "committed", "this run", lineterm="", n=1))
        size = len(nbformat.writes(done).encode())
        print(f"{name}: {time.monotonic() - start:.0f} s, {size / 1e3:.0f} kB", flush=True)
        if size > MOST_BYTES:
            sys.exit(f"{path} would have {size:,} bytes, expected at most {MOST_BYTES:,}: draw smaller pictures")
        if args.write:
            nbformat.write(done, path)
        elif difference:
            print("\n".join(difference), flush=True)
            wrong = True
    if wrong:
        sys.exit("notebooks differ from what is committed: python .ci/notebooks.py --write, and look at what changed")


if __name__ == "__main__":
    main()
