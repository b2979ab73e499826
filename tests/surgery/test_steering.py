"""Threads and tasks that steer one model: none sees a coefficient of another's within its own block."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import surgery
from surgery import merge, set_coeff, sites, steer, to_graph
from tests.support.operated_models import operated

WORDS = "is being steered by another thread or task"


def expected(found: Any, coeffs: list[float]) -> dict[float, torch.Tensor]:
    outs = {}
    for coeff in coeffs:
        with steer(found.model, coeff):
            outs[coeff] = found.run()
    return outs


@pytest.mark.parametrize("kind", ["in place", "graph", "compiled"])
def test_two_threads_each_get_their_own_result_or_are_refused(kind):
    found = operated("mlp")
    if kind == "graph":
        found.model = to_graph(found.model, found.inputs)
    elif kind == "compiled":
        found.model = torch.compile(found.model, backend="eager", fullgraph=True)
    coeffs = [0.0, 0.5, 1.0, 2.0]
    known, counts = expected(found, coeffs), {"right": 0, "refused": 0, "wrong": 0}
    assert min((known[a] - known[b]).abs().max() for a in coeffs for b in coeffs if a != b) > 1e-2
    lock = threading.Lock()

    def work(coeff: float) -> None:
        for _ in range(100):
            try:
                with steer(found.model, coeff):
                    apart = (found.run() - known[coeff]).abs().max()  # a thread may round in another way
                    result = "right" if apart < 1e-5 else "wrong"
            except surgery.SurgeryError as error:
                result = "refused" if WORDS in str(error) else "wrong"
            with lock:
                counts[result] += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, coeffs))
    assert counts["wrong"] == 0
    assert counts["right"] > 0
    assert sum(counts.values()) == 400
    assert {float(site.steering.coeff) for site in sites(found.model).values()} == {1.0}


def test_two_blocks_at_once():
    found, inside, leave, errors = operated("mlp"), threading.Event(), threading.Event(), []

    def hold() -> None:
        with steer(found.model, 0.25):
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    for attempt in (lambda: steer(found.model, 2.0).__enter__(), lambda: set_coeff(found.model, 2.0)):
        with pytest.raises(surgery.SurgeryError, match=WORDS) as caught:
            attempt()
        errors.append(caught)
    assert {float(site.steering.coeff) for site in sites(found.model).values()} == {0.25}
    with steer(copy.deepcopy(found.model), 2.0):  # as the message advises
        pass
    leave.set()
    thread.join()
    with steer(found.model, 2.0):
        assert {float(site.steering.coeff) for site in sites(found.model).values()} == {2.0}
    assert {float(site.steering.coeff) for site in sites(found.model).values()} == {1.0}


def test_blocks_of_one_thread_are_nested():
    found = operated("mlp")
    with steer(found.model, 0.5), steer(found.model, 0.25):
        set_coeff(found.model, 0.125)
        assert {float(site.steering.coeff) for site in sites(found.model).values()} == {0.125}
    with pytest.raises(ZeroDivisionError), steer(found.model, 0.5):
        1 / 0  # noqa: B018
    with pytest.raises(surgery.InputError), steer(found.model, float("nan")):
        pass
    with steer(found.model, 2.0):
        assert {float(site.steering.coeff) for site in sites(found.model).values()} == {2.0}


def test_a_model_that_is_merged_within_a_block_is_let_go():
    found = operated("mlp")
    with steer(found.model, 0.5):
        merge(found.model)
    assert sites(found.model) == {}


def test_tasks_that_take_turns_do_not_mix():
    found = operated("mlp")
    known, refusals = expected(found, [0.5, 2.0]), []

    async def work(coeff: float, pause: float) -> None:
        for _ in range(5):
            try:
                with steer(found.model, coeff):
                    await asyncio.sleep(pause)
                    assert torch.equal(found.run(), known[coeff])
            except surgery.SurgeryError as error:
                refusals.append(str(error))
                await asyncio.sleep(pause)

    async def both() -> None:
        await asyncio.gather(work(0.5, 0.001), work(2.0, 0.002))

    asyncio.run(both())
    assert refusals
    assert all(WORDS in text for text in refusals)


def test_a_task_within_a_block_may_steer_on():
    found = operated("mlp")

    async def inner() -> float:
        with steer(found.model, 0.25):
            await asyncio.sleep(0)
            return float(next(iter(sites(found.model).values())).steering.coeff)

    async def outer() -> tuple[float, float]:
        with steer(found.model, 0.5):
            within = await asyncio.create_task(inner())
            return within, float(next(iter(sites(found.model).values())).steering.coeff)

    assert asyncio.run(outer()) == (0.25, 0.5)


@pytest.mark.parametrize("after", [1, 3, 5, 8])
def test_an_interrupt_on_the_way_in_locks_nothing(after, monkeypatch):
    found, calls = operated("mlp"), []

    class Interrupted(dict):
        def setdefault(self, *args):
            calls.append(args)
            if len(calls) == after:
                raise KeyboardInterrupt
            return super().setdefault(*args)

    monkeypatch.setattr("surgery.hosting.steering_guard._BLOCKS", Interrupted())
    for _ in range(3):
        with contextlib.suppress(KeyboardInterrupt), steer(found.model, 0.5):
            pass
    with ThreadPoolExecutor(1) as pool:
        pool.submit(set_coeff, found.model, 2.0).result()
    assert {float(site.steering.coeff) for site in sites(found.model).values()} == {2.0}
