"""Saved and parsed pages."""

import pytest
from pages import RUNS, read

from cnn_jax.report.page import save_page


@pytest.fixture(scope="module", params=RUNS)
def saved(request, tmp_path_factory):
    """The arguments of a run and its parsed page."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    save_page(path, **RUNS[request.param])
    return RUNS[request.param], read(path)


@pytest.fixture
def page(tmp_path):
    """Saves the page of a run and parses it."""

    def save_and_read(run):
        save_page(tmp_path / "report.html", **run)
        return read(tmp_path / "report.html")

    return save_and_read
