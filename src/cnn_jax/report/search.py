"""Pictures of a search, drawn by Optuna."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna

MIN_TRIALS = 2
"""The number of finished trials that say something about the settings."""


def has_results(study: "optuna.Study") -> bool:
    """Whether enough trials have finished, with different results, to draw pictures."""
    from optuna.trial import TrialState

    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return len(finished) >= MIN_TRIALS and len({trial.value for trial in finished}) > 1


def save_importances(study: "optuna.Study", path: Path) -> None:
    """Plot how much of the variance of the accuracy each setting explains.

    By functional analysis of variance (Hutter et al., 2014, https://proceedings.mlr.press/v32/hutter14.html).
    """
    from optuna.visualization.matplotlib import plot_param_importances

    with _drawing():
        axes = plot_param_importances(study)
        axes.get_legend().remove()  # it names the one kind of bar, and covers one
        figure = axes.figure
        figure.set_size_inches(7, 1.5 + 0.5 * len(study.best_trial.params))
        figure.savefig(path, dpi=120, bbox_inches="tight", format="png")


def save_parallel_coordinates(study: "optuna.Study", path: Path) -> None:
    """Plot every finished trial as a line through its settings, colored by its accuracy."""
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    with _drawing():
        figure = plot_parallel_coordinate(study, target_name="validation accuracy").figure
        figure.set_size_inches(4 + 1.8 * len(study.best_trial.params), 4.5)
        figure.savefig(path, dpi=120, bbox_inches="tight", format="png")


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Undo Optuna's change of matplotlib's style, close its figure, and ignore its warning that it may change."""
    from matplotlib import pyplot, style
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings(), style.context("default"):
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            yield
        finally:
            pyplot.close()
