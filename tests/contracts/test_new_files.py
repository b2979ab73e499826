"""A new basis, core, variant or lowering is one file, and nothing outside of its file knows a variant's name."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.variants import REGISTRY

ROOT = Path(__file__).parents[2]

BASIS = '''
"""A toy: the largest channels of the input. The columns of its U are no more orthogonal than those of the weight."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.bases import Basis
from surgery.factors.svd import Factorisation


@dataclass(frozen=True)
class ToyChannels(Basis):
    """Configuration of ``toy_channels``."""

    smallest: bool = False

    name: ClassVar[str] = "toy_channels"
    gives: ClassVar[frozenset[str]] = frozenset({"orthonormal Vh"})

    def factorise(self, weight, r, statistic, seed):
        W = weight.detach().to(torch.float64)
        largest = W.abs().amax(dim=0)
        unit = W / torch.where(largest > 0, largest, 1.0)
        norms = torch.linalg.vector_norm(unit, dim=0)
        order = (largest * norms).argsort(descending=True, stable=True)
        chosen = order[-r:] if self.smallest else order[:r]
        U = (unit / torch.where(norms > 0, norms, 1.0))[:, chosen].contiguous()
        Vh = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)[chosen].contiguous()
        return Factorisation(U, (largest * norms)[chosen], Vh, "toy", 0.0, 0.0, 1.0)
'''

CORE = '''
"""A toy: one factor per direction, and one for all."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from surgery.cores import CoreConfig


@dataclass(frozen=True)
class ToyFactor(CoreConfig):
    """Configuration of ``toy_factor``."""

    halved: bool = False

    name: ClassVar[str] = "toy_factor"

    def init_core(self, r, generator):
        return {"factor": torch.zeros(r)}

    def delta(self, h, S, core, coeff):
        return h * (S * coeff * core.factor / (2 if self.halved else 1)).to(h.dtype)
'''

VARIANT = '''
"""A toy: the toy core on the toy basis."""

from dataclasses import dataclass
from typing import ClassVar

from surgery.bases.toy_channels import ToyChannels
from surgery.cores.toy_factor import ToyFactor
from surgery.variants import Variant


@dataclass(frozen=True)
class ToyVariant(Variant):
    """Configuration of ``toy``."""

    smallest: bool = False
    halved: bool = False

    name: ClassVar[str] = "toy"
    own_basis: ClassVar[type[ToyChannels]] = ToyChannels
    own_core: ClassVar[type[ToyFactor]] = ToyFactor
'''

LOWERING = '''
"""A toy: the change of the weight as a matrix of its own, beside the base's product."""

import torch
import torch.nn.functional as F

from surgery.lowerings import ALWAYS, REGISTRY, Work, register


@register
class ToyChange:
    """Two products with matrices of the weight's size."""

    name = "toy_change"
    form = "delta"
    steers_rows = False
    caches = True

    def why_not(self, site):
        """The variant is not linear."""
        return None if site.variant.linear else f"{site.variant.name} is not linear in its input"

    def advised(self, site):
        """Always."""
        return True

    def run(self, site, x, base):
        """The base's own forward, plus the product with the change."""
        if torch.compiler.is_compiling() or site.core.trains():
            return REGISTRY[ALWAYS].run(site, x, base)
        y = base()
        return y + F.linear(x, site.cache.get("toy_change", change)).to(y.dtype)

    def work(self, size, *, training):
        """Another product, and the making of its matrix."""
        if training:
            return REGISTRY[ALWAYS].work(size, training=True)
        n, d_out, d_in, r, _, item, launches = size
        make = [Work.product(d_out, d_in, r, max(item, 4)), Work(0.0, 0, launches)]
        return [Work.product(n, d_out, d_in, item), Work.pointwise(n * d_out, item), *(w.amortised() for w in make)]


def change(site):
    """``U D^T Vh`` (d_out, d_in)."""
    with torch.no_grad():
        left = site.delta_factor()
        return (left @ site.factors.Vh.to(left.dtype)).to(site.factors.U.dtype)
'''

KIND = '''
"""A toy: weights in eight bits, with one scale per row, that a subclass of ``nn.Linear`` casts in each forward."""

import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from surgery.modules.base_weights import BaseWeight


class Int8(nn.Parameter):
    """Integers, and a scale."""

    def __new__(cls, data, scale):
        made = torch.Tensor._make_subclass(cls, data, False)
        made.scale = scale
        return made

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), type(self)(self.data.clone(), self.scale.clone()))

    def numbers(self):
        return self.data.to(self.scale.dtype) * self.scale


class Int8Linear(nn.Linear):
    """A linear module whose weight is computed in each forward."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        W = self.weight.detach()
        scale = W.abs().amax(dim=1, keepdim=True) / 127
        self.weight = Int8((W / scale).round().to(torch.int8), scale)

    def forward(self, x):
        return F.linear(x, self.weight.numbers(), self.bias)


class ToyInt8(BaseWeight):
    """Eight bits per entry."""

    kind = "toy_int8"
    holds_entries = False

    @classmethod
    def accepts(cls, parameter, layout, matrix_shape, rows):
        """One matrix, in the layout of ``nn.Linear``."""
        return type(parameter) is Int8 and layout == "out_in" and len(matrix_shape) == 2 and rows is None

    @property
    def dtype(self):
        """That of the scales."""
        return self.reader.parameter().scale.dtype

    def matrix(self):
        """The integers times the scales."""
        return self.reader.parameter().numbers()

    def fingerprint(self):
        """Of integers and scales."""
        parameter = self.reader.parameter()
        parts = (parameter.data, parameter.scale)
        digest = hashlib.sha256(b"".join(bytes(t.contiguous().flatten().view(torch.uint8).numpy().data) for t in parts))
        return f"int8:{digest.hexdigest()}"

    def with_delta(self, left, right):
        """Not in eight bits."""
        return "eight bits do not hold the change; cast the model to float first"


def example():
    return nn.Sequential(Int8Linear(12, 9), nn.Tanh(), nn.Linear(9, 7))
'''

FILES = {
    "bases/toy_channels.py": BASIS,
    "cores/toy_factor.py": CORE,
    "variants/toy.py": VARIANT,
    "lowerings/toy_change.py": LOWERING,
    "modules/base_weights/toy_int8.py": KIND,
}
SUITES = {  # how many cases of each the toys add at least
    "contracts/test_bases_and_cores": 15,
    "contracts/test_pairs": 40,
    "contracts/test_variants": 100,
    "contracts/test_variant_maths": 1,
    "contracts/test_variant_parity": 5,
    "contracts/test_variant_graphs": 3,
    "contracts/test_stress": 30,
    "contracts/test_stress_cores": 5,
    "contracts/test_base_weights": 16,
    "surgery/test_lowerings": 15,
    "surgery/test_weight_cache": 14,
}


@pytest.mark.long
def test_a_new_file_is_all_that_a_new_basis_core_variant_lowering_or_kind_needs(tmp_path):
    """Add files to a copy of the project, none of which needs another but the variant its basis and core, and run the
    cases of the test suites that are named after the toys."""
    for package in ("surgery", "passes", "exporters", "bench", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, source in FILES.items():
        assert not (tmp_path / "surgery" / name).exists()
        (tmp_path / "surgery" / name).write_text(source)
    paths = [f"tests/{name}.py" for name in SUITES]
    command = [sys.executable, "-m", "pytest", *paths, "-k", "toy", "-m", "not full", "-vv", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    passed = re.findall(r"^tests/([\w/]+)\.py::.* PASSED", done.stdout, re.MULTILINE)
    # only the copy has toys, so that the copy was imported
    assert not {name: (n, least) for name, least in SUITES.items() if (n := passed.count(name)) < least}
    summary = done.stdout.strip().splitlines()[-1]
    assert re.search(rf"\b{len(passed)} passed", summary), summary
    assert not re.search("failed|skipped|error", summary), summary


# what may say a variant's name outside of its file: a default that a user sees, and the project's own name
NAMED_ELSEWHERE = {
    ("surgery/hosting/graph_surgery.py", "sspace"),  # of the submodule that holds the sites of a graph
    ("surgery/storage/model_card.py", "sspace"),  # a tag of model cards
    ("surgery/hosting/called_module.py", "sspace"),  # of the one attribute that a site's module gets
}
TYPED = ("surgery/__init__.py", "surgery/verbs/argument_types.py")  # what editors complete; kept in step by a test


def words_of(source: str) -> set[str]:
    """Identifiers and words of strings in Python source, but for docstrings and comments."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [n.body[0] for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n, clean=False)]
    docstrings = {id(statement.value) for statement in texts}
    docstrings |= {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        for _, value in ast.iter_fields(node):
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    found |= set(re.findall(r"[\w-]+", text))
    return found


def test_nothing_outside_of_its_file_knows_a_variant():
    names = {name for cls in REGISTRY.values() for name in (cls.name, cls.__name__)}
    found = set()
    for package in ("surgery", "passes", "exporters"):
        for path in (ROOT / package).rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            if not place.startswith("surgery/variants/") and place not in TYPED:
                found |= {(place, name) for name in names & words_of(path.read_text(encoding="utf-8"))}
    assert found == NAMED_ELSEWHERE


def test_no_variant_knows_another():
    for cls in REGISTRY.values():
        others = {name for other in REGISTRY.values() if other is not cls for name in (other.name, other.__name__)}
        assert not others & words_of(Path(sys.modules[cls.__module__].__file__).read_text(encoding="utf-8"))
