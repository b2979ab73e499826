"""The same seed gives the same factors, core and file: again, in another process, with other numbers of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from passes.errors import InputError
from surgery import Contrast, apply_surgery, set_coeff, sites
from surgery.errors import WeightError
from surgery.factors.svd import factorise
from surgery.support.determinism import one_thread, side_by_side
from tests.support.deterministic_runs import D_IN, data_of, digests, fresh_model, saved, some
from tests.support.variant_cases import VARIANTS

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.name}-{VARIANTS.index(v)}")


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


CHILD = """
import json, sys
from pathlib import Path
import torch
from tests.support.deterministic_runs import digests, run_everything
threads, strict = int(sys.argv[2]), sys.argv[3] == "strict"
torch.set_num_threads(threads)
torch.use_deterministic_algorithms(strict)
assert torch.get_num_threads() == threads
found = digests(Path(sys.argv[1]))
assert torch.get_num_threads() == threads
if strict:
    run_everything(Path(sys.argv[1]))
print(json.dumps(found))
"""


def child(folder: Path, n: int, mode: str = "plain") -> subprocess.Popen[str]:
    folder.mkdir()
    variables = os.environ | {"OMP_NUM_THREADS": str(n), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", CHILD, str(folder), str(n), mode]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, str]:
    out, problems = process.communicate()
    assert process.returncode == 0, problems[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize(("n", "mode"), [(2, "strict"), pytest.param(1, "plain", marks=pytest.mark.full)])
def test_the_same_files_in_another_process(n, mode, tmp_path):
    process = child(tmp_path / "there", n, mode)
    with threads(1):
        expected = digests(tmp_path / "here")
    assert len(set(expected.values())) > len(VARIANTS)
    assert result(process) == expected


def test_the_same_files_again_and_with_two_threads(tmp_path):
    variant, data = surgery.AntiPaSTO(), data_of(surgery.AntiPaSTO())
    found = set()
    for i, n in enumerate((1, 2, 1, 2)):
        with threads(n):
            found.add(saved(tmp_path / str(i), variant, data) + saved(tmp_path / f"{i}+", variant, None))
    assert len(found) == 1


@pytest.mark.full
@pytest.mark.parametrize("n", [3, 4, 8])
def test_the_same_files_with_many_threads(n, tmp_path):
    with threads(1):
        expected = digests(tmp_path / "here")
    assert result(child(tmp_path / "there", n)) == expected


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True)) and one[3:7] == other[3:7]


@pytest.mark.parametrize("method", ["exact", "randomised"])
@pytest.mark.parametrize("shape", [(7, 13), (64, 64), (100, 136), (520, 530), (200, 530)])
def test_a_factorisation_has_the_same_bits_with_two_threads(shape, method):
    W = some(*shape) / shape[1] ** 0.5
    for r in {4, min(shape) // 4, min(shape)}:
        one = factorise(W, r, method)
        with threads(2):
            assert same(factorise(W, r, method), one)
            assert torch.get_num_threads() == 2


def fail_in_one_thread() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        raise InputError("here")


def test_one_thread_sets_the_number_back():
    with threads(2):
        with pytest.raises(InputError, match="here"):
            fail_in_one_thread()
        assert torch.get_num_threads() == 2
        with one_thread(False):
            assert torch.get_num_threads() == 2


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_side_by_side_keeps_the_order_and_the_number_of_threads(workers):
    seen: list[int] = []

    def work(item: int) -> int:
        seen.append(torch.get_num_threads())
        return item * item

    with threads(2):
        assert list(side_by_side(work, iter(range(20)), workers)) == [i * i for i in range(20)]
        assert torch.get_num_threads() == 2
        later: list[int] = []
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert later == [2]
    assert seen == [1] * 20
    assert list(side_by_side(work, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_side_by_side_runs_little_ahead_and_stops_where_it_is_closed(workers):
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return item

    with threads(2):
        results = side_by_side(work, range(100), workers)
        assert next(results) == 0
        results.close()
        assert len(started) <= workers + 1
        assert torch.get_num_threads() == 2

        def fail(item: int) -> int:
            if item == 3:
                raise InputError("three")
            return item

        results = side_by_side(fail, range(100), workers)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(InputError, match="three"):
            next(results)
        assert torch.get_num_threads() == 2


def test_a_failure_with_two_threads_names_its_site_and_leaves_the_model():
    with threads(2):
        model, before = fresh_model(), fresh_model().state_dict()
        same_inputs = Contrast([some(4, D_IN)], [some(4, D_IN)], pool="all")
        options: Any = {"r": 4, "target_modules": "all-linear", "example_inputs": some(2, D_IN), "progress": False}
        with pytest.raises(InputError, match="site '0': the positive and the negative set"):
            apply_surgery(model, "sspace", calibration=same_inputs, **options)
        huge = fresh_model(torch.float16)
        huge[2].weight.data.mul_(0).add_(6e4)
        with pytest.raises(WeightError, match="site '2'"):
            apply_surgery(huge, "antipasto", **options | {"example_inputs": some(2, D_IN).half()})
        assert not sites(model)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert torch.get_num_threads() == 2


def test_factors_that_are_made_in_inference_mode_can_be_trained():
    model = fresh_model()
    with threads(2), torch.inference_mode():
        apply_surgery(model, "antipasto", r=4, target_modules="all-linear", progress=False)
    set_coeff(model, 1.0)
    model(some(3, D_IN)).sum().backward()
    assert all(site.core.g.grad is not None for site in sites(model).values())
