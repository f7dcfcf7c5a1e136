"""Checkpoints of the training state; the only room that knows Orbax."""

from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from cnn_jax.errors import UsageError

Which = Literal["newest", "best"]


class Checkpoints:
    """The checkpoints of a run, one per epoch end: the newest two and the one of the best test accuracy are kept.

    A context manager: leaving it waits for saves that are still being written.
    """

    def __init__(self, directory: Path, *, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(
                [keep.LatestN(2), keep.BestN(n=1, get_metric_fn=_test_accuracy)]
            ),
            best_fn=_test_accuracy,  # Orbax writes metrics down only where it is given this too
            cleanup_tmp_directories=not read_only,  # another process may be writing what one only reads
            create=not read_only,
        )
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def save(self, state: TrainState, meta: dict[str, Any], test_accuracy: float) -> None:
        """Begin to write a checkpoint; the state may be reused as soon as this returns.

        Args:
            state: saved whole.
            meta: whatever else the run needs to go on, as JSON.
            test_accuracy: by which the best checkpoint is chosen.
        """
        # On a CPU, what jax.device_get returns is the device's own memory, which the next step reuses.
        arrays = jax.tree.map(np.array, _arrays(state))
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)),
            metrics={"test_accuracy": test_accuracy},
        )

    def meta(self, which: Which = "newest") -> dict[str, Any]:
        """The JSON saved with a checkpoint."""
        return self._manager.restore(self._step(which), args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, like: TrainState, which: Which = "newest") -> TrainState:
        """A saved state.

        Args:
            like: a state of the same model, or its shapes and dtypes.
            which: the newest checkpoint, or the one of the best test accuracy.

        Raises:
            UsageError: there is no checkpoint.
        """
        template = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), _arrays(like))
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        arrays = self._manager.restore(self._step(which), args=restore).state
        return like.replace(**jax.device_put(arrays))

    def _step(self, which: Which) -> int:
        step = self._manager.latest_step() if which == "newest" else self._manager.best_step()
        if step is None:
            raise UsageError(f"{self._directory} holds no checkpoint: train the run first, or name another")
        return step


def _arrays(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _test_accuracy(metrics: dict[str, float]) -> float:
    return metrics["test_accuracy"]
