"""What a verb finds out about a model, it finds out once: modules are walked, products read and weights hashed once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import passes
from surgery import (
    apply_surgery,
    load_adapter,
    merge,
    recalibrate,
    refresh,
    report,
    save_adapter,
    set_coeff,
    sites,
    steer,
    to_graph,
    undo_surgery,
)
from surgery.hosting.state import record_of
from surgery.support import fingerprint as fingerprints

ROOT = str(Path(passes.__path__[0]).parent)
OURS = tuple(f"{ROOT}/{package}/" for package in ("passes", "surgery"))
GRAPH_PRODUCTS = sys.modules["passes.capture.graph_products"]
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Counts:
    """Walks of all modules of a model that our code begins, readings of a graph's products, and hashes of weights."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.clear()

    def clear(self) -> None:
        self.walks, self.products, self.hashes = 0, 0, Counter[tuple[int, torch.dtype]]()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    found = Counts()
    walk, read, hashed = nn.Module.named_modules, GRAPH_PRODUCTS.products_by_site, fingerprints._hashed

    def named_modules(self: nn.Module, memo: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not memo and self is found.model:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename == walk.__code__.co_filename:
                frame = frame.f_back
            found.walks += frame.f_code.co_filename.startswith(OURS)
        return walk(self, memo, *args, **kwargs)

    def products_by_site(*args: Any) -> Any:
        found.products += 1
        return read(*args)

    def of(tensor: torch.Tensor) -> str:
        found.hashes[tensor.data_ptr(), tensor.dtype] += 1
        return hashed(tensor)

    for peft in ("peft.tuners.tuners_utils", "peft.utils.other"):  # whose layers are looked for once it was imported
        monkeypatch.delitem(sys.modules, peft, raising=False)
    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    monkeypatch.setattr(GRAPH_PRODUCTS, "products_by_site", products_by_site)
    monkeypatch.setattr(fingerprints, "_hashed", of)
    return found


def plain(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))).eval()


HOSTS: dict[str, Callable[[int], nn.Module]] = {
    "modules": plain,
    "graph": lambda layers: fx.symbolic_trace(plain(layers)),
}
# how often each verb walks all modules, at most; the first surgery also runs, captures and inspects the model
WALKS = {
    "modules": {
        "apply": 15, "apply again": 4, "set_coeff": 1, "steer": 0, "report": 3, "refresh": 1, "save": 5,
        "recalibrate": 14, "load over": 11, "to_graph": 6, "undo": 4, "load": 9, "merge": 3,
    },
    "graph": {
        "apply": 20, "apply again": 7, "set_coeff": 1, "steer": 0, "report": 3, "refresh": 1, "save": 5,
        "recalibrate": 17, "load over": 13, "to_graph": 5, "undo": 4, "load": 12, "merge": 5,
    },
}  # fmt: skip


def steered(model: nn.Module) -> None:
    with steer(model, 0.3):
        pass


def verbs(model: nn.Module, folder: Path) -> dict[str, Callable[[], Any]]:
    options: dict[str, Any] = {"r": 4, "example_inputs": X, "progress": False}
    return {
        "apply": lambda: apply_surgery(model, "antipasto", target_modules=r"[1-9]\d*", **options),
        "apply again": lambda: apply_surgery(model, "antipasto", target_modules=["0"], **options),
        "set_coeff": lambda: set_coeff(model, 0.5),
        "steer": lambda: steered(model),
        "report": lambda: report(model),
        "refresh": lambda: refresh(model),
        "save": lambda: save_adapter(model, folder, progress=False),
        "recalibrate": lambda: recalibrate(model, [X], reset=True, progress=False),
        "load over": lambda: load_adapter(model, folder, progress=False),
        "to_graph": lambda: to_graph(model, X),
        "undo": lambda: undo_surgery(model),
        "load": lambda: load_adapter(model, folder, progress=False),
        "merge": lambda: merge(model),
    }


@pytest.mark.parametrize("host", HOSTS)
def test_no_verb_walks_the_modules_once_for_each_site(host: str, counts: Counts, tmp_path: Path) -> None:
    walks: list[dict[str, int]] = []
    for layers in (3, 12):
        counts.model = HOSTS[host](layers)
        walks.append({})
        for name, run in verbs(counts.model, tmp_path / str(layers)).items():
            counts.clear()
            run()
            walks[-1][name] = counts.walks
    assert walks[0] == walks[1]
    assert {name: most for name, most in WALKS[host].items() if walks[0][name] > most} == {}, walks[0]
    assert walks[0].keys() == WALKS[host].keys()


def test_the_products_of_a_graph_are_read_once(counts: Counts, tmp_path: Path) -> None:
    counts.model = HOSTS["graph"](3)
    read = {}
    for name, run in verbs(counts.model, tmp_path).items():
        counts.clear()
        run()
        read[name] = counts.products
    assert {name for name, times in read.items() if times} == {"apply", "load"}  # its state is new there
    assert set(read.values()) == {0, 1}
    model = apply_surgery(plain(3), "antipasto", r=4, progress=False)
    counts.clear()
    graph = to_graph(model, X)
    assert counts.products == 1
    recalibrate(graph, [X], reset=True, progress=False)
    assert counts.products == 1


@pytest.mark.parametrize("host", HOSTS)
def test_a_save_hashes_each_weight_once(host: str, counts: Counts, tmp_path: Path) -> None:
    model = apply_surgery(HOSTS[host](3), "antipasto", r=4, example_inputs=X, progress=False)
    save_adapter(model, tmp_path / "one", progress=False)
    assert len(counts.hashes) == 9  # of three weights, as they are and in two narrower dtypes
    assert set(counts.hashes.values()) == {1}
    counts.clear()
    save_adapter(model, tmp_path / "two", progress=False)
    load_adapter(model, tmp_path / "one", progress=False)
    recalibrate(model, [X], reset=True, progress=False)
    assert not counts.hashes


def test_products_are_read_again_where_they_changed(counts: Counts) -> None:
    """A hook that came since the first surgery has its effect, and a weight that was cast is read as it is now."""
    model = fx.symbolic_trace(plain(3))
    apply_surgery(model, "antipasto", r=4, target_modules=["0"], example_inputs=X, progress=False)
    assert record_of(model).original.products.keys() == {"0", "1", "2"}
    model.get_submodule("1").register_forward_hook(lambda module, args, output: 2 * output)
    base = model(X)
    counts.clear()
    apply_surgery(model, "antipasto", r=4, target_modules=["1"], progress=False)
    assert counts.products == 1
    assert sites(model)["1"].host.name == "module"
    assert torch.equal(model(X), base)
    model.double()
    counts.clear()
    apply_surgery(model, "antipasto", r=4, target_modules=["2"], progress=False)
    assert counts.products == 1
    assert sites(model)["2"].core.dtype == torch.float64
