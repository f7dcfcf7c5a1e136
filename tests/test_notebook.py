"""The Colab notebook, from its first cell to its last."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "scripts" / "colab.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_it_runs(notebook, tmp_path):
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += '\nSOURCE, DATASET, EPOCHS = "", "digits", 1'
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "cpu" in printed
    assert "precision of products: float32\n" in printed
    assert re.search(r"^compilation: \d+\.\d s\nepoch: \d+\.\d\d s, [\d,]+ images/s$", printed, flags=re.MULTILINE)
    assert "epoch: 0 total_correct: " in printed
    assert "test accuracy 0." in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3  # curves, confusion, a test image
    assert not [output for output in outputs if output.output_type == "error"]
    assert (tmp_path / "run.zip").exists()
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_train_cell_runs_again(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = (cell for cell in notebook.cells if "fit(" in cell.source)
    parameters = {
        "DATASET": "digits",
        "BATCH_SIZE": 100,
        "PRECISION": "default",
        "WORKDIR": "run",
        "SAVE_TO_DRIVE": False,
    }

    def train(epochs, if_it_exists):
        exec(cell.source, names := {**parameters, "EPOCHS": epochs, "IF_IT_EXISTS": if_it_exists})
        return names["run"]

    assert len(train(1, "resume").history) == 1
    assert len(train(2, "resume").history) == 2
    assert train(1, "start another run").workdir == Path("run-2")
