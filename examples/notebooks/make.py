"""Make the notebooks beside this file from the examples, and run them: python examples/notebooks/make.py [NAME ...]"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
EXAMPLES = HERE.parent


def cells(path: Path) -> nbformat.NotebookNode:
    """The notebook of a script whose cells begin with ``# %%``, not run."""
    notebook = jupytext.read(path)
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.from_dict({})
    return notebook


def scripts() -> list[Path]:
    """The examples that are written in cells."""
    return [path for path in sorted(EXAMPLES.glob("*.py")) if path.read_text().startswith("# %%")]


def run(path: Path) -> nbformat.NotebookNode:
    notebook = cells(path)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        for output in (o for o in cell.get("outputs", []) if o.output_type == "stream"):
            kept = [line for line in output.text.splitlines(keepends=True) if output.name == "stdout"]
            output.text = "".join(kept)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text]
    return notebook


def main() -> None:
    for path in scripts():
        if path.stem in sys.argv[1:] or not sys.argv[1:]:
            print(path.stem, flush=True)
            nbformat.write(run(path), HERE / f"{path.stem}.ipynb")


if __name__ == "__main__":
    main()
