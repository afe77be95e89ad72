"""The tutorial runs as it stands, and is kept with its pictures."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "tutorial.ipynb"
NEEDED = ("*.py", "demo.jpeg", "common", "studies", "demo_model", "tutorial.ipynb")
MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def nbformat():
    return pytest.importorskip("nbformat")


@pytest.fixture
def copied(tmp_path):
    """A working copy, so that a run changes nothing that is tracked."""
    for path in (path for pattern in NEEDED for path in ROOT.glob(pattern)):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    return tmp_path


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_cell_runs(copied, nbformat, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("peft")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setitem(os.environ, name, "1")
    notebook = nbformat.read(copied / NOTEBOOK.name, as_version=4)
    place = {"metadata": {"path": str(copied)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()  # raises
    for cell in code_cells(notebook):
        assert cell.outputs, cell.source
    assert (copied / "build/tutorial/words/index.html").is_file()


def test_its_outputs_are_kept_and_small(nbformat):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    pictures = 0
    for cell in code_cells(notebook):
        assert cell.outputs, cell.source
        assert all(output.output_type != "error" for output in cell.outputs), cell.source
        pictures += any("image/jpeg" in output.get("data", {}) for output in cell.outputs)
    assert pictures >= 6
    assert NOTEBOOK.stat().st_size < MOST_BYTES


def test_it_names_no_place_of_whoever_ran_it():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert "/site-packages/" not in text
