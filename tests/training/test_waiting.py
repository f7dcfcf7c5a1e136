import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from cnn_jax.training.waiting import IdleTime


class Pending:
    """What stands for an array that the devices compute until a point in time."""

    def __init__(self, seconds):
        self._until = time.perf_counter() + seconds

    def block_until_ready(self):
        time.sleep(max(0, self._until - time.perf_counter()))


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.mark.parametrize(("computing", "working", "idle"), [(0, 0.3, 0.3), (0.2, 0.5, 0.3), (0.5, 0.2, 0)])
def test_the_time_after_the_devices_have_finished(thread, computing, working, idle):
    with IdleTime(Pending(computing), thread) as waiting:
        time.sleep(working)
    assert waiting.seconds == pytest.approx(idle, abs=0.1)


def test_the_context_does_not_wait(thread):
    began = time.perf_counter()
    with IdleTime(Pending(0.5), thread) as waiting:
        pass
    assert time.perf_counter() - began < 0.4
    assert waiting.seconds == 0


def test_arrays_of_jax(thread):
    with IdleTime({"a": jax.block_until_ready(jnp.ones(3))}, thread) as waiting:
        time.sleep(0.2)
    assert waiting.seconds == pytest.approx(0.2, abs=0.1)
