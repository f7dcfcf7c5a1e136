import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cnn_jax.data import memory
from cnn_jax.data.memory import MemoryBudget, available_memory


def test_the_sum_stays_within_the_total():
    budget = MemoryBudget(100)
    held = []

    def work(num_bytes):
        with budget.reserve(num_bytes):
            held.append(num_bytes)
            assert sum(held) <= 100 or held == [num_bytes]
            threading.Event().wait(0.002)
            held.remove(num_bytes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [40, 30, 30, 100, 10, 250, 60, 50, 40, 90] * 5))
    assert held == []
    assert 40 < budget.peak <= 100


def test_a_request_larger_than_the_total_is_granted_alone():
    budget = MemoryBudget(100)
    with ThreadPoolExecutor(1) as pool:
        with budget.reserve(1):
            large = pool.submit(lambda: budget.reserve(1000).__enter__())
            with pytest.raises(TimeoutError):
                large.result(0.02)
        large.result(5)


def test_large_requests_are_not_overtaken():
    budget = MemoryBudget(100)
    order = []

    def work(name, num_bytes):
        with budget.reserve(num_bytes):
            order.append(name)

    with ThreadPoolExecutor(2) as pool, budget.reserve(60):
        large = pool.submit(work, "large", 90)
        while not large.running():
            pass
        threading.Event().wait(0.02)
        small = pool.submit(work, "small", 10)
        with pytest.raises(TimeoutError):
            small.result(0.02)
    assert order == ["large", "small"]


def test_an_error_releases_the_reservation():
    budget = MemoryBudget(100)
    for _ in range(3):
        with pytest.raises(KeyError), budget.reserve(80):
            raise KeyError


@pytest.mark.parametrize(
    ("meminfo", "limit", "expected"),
    [
        ("MemTotal:  64 kB\nMemAvailable:       48 kB\nSwapFree: 9 kB\n", None, 48 << 10),
        ("MemAvailable: 48 kB\n", "max\n", 48 << 10),
        ("MemAvailable: 48 kB\n", "1000\n", 1000),
        ("MemAvailable: 48 kB\n", "9223372036854771712\n", 48 << 10),  # no limit, in version 1 of cgroups
        (None, None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
    ],
)
def test_available_memory(tmp_path, monkeypatch, meminfo, limit, expected):
    paths = [tmp_path / "meminfo", tmp_path / "limit"]
    for path, content in zip(paths, (meminfo, limit), strict=True):
        if content is not None:
            path.write_text(content)
    monkeypatch.setattr(memory, "MEMINFO", paths[0])
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (tmp_path / "missing", paths[1]))
    assert available_memory() == expected


def test_available_memory_of_this_machine():
    assert 1 << 24 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
