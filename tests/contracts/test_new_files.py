"""A new basis, core or variant is one file, and nothing outside of its file knows the name of a variant."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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

FILES = {"bases/toy_channels.py": BASIS, "cores/toy_factor.py": CORE, "variants/toy.py": VARIANT}
SUITES = {  # how many cases of each the toys add at least
    "test_bases_and_cores": 15,
    "test_pairs": 60,
    "test_variants": 100,
    "test_variant_maths": 1,
    "test_variant_parity": 10,
    "test_variant_graphs": 5,
    "test_stress": 50,
    "test_stress_cores": 5,
}


def test_a_new_file_is_all_that_a_new_basis_core_or_variant_needs(tmp_path):
    for package in ("surgery", "passes", "exporters", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, source in FILES.items():
        (tmp_path / "surgery" / name).write_text(source)
    suites = [f"tests/contracts/{name}.py" for name in SUITES]
    command = [sys.executable, "-m", "pytest", *suites, "-k", "toy", "-m", "not full", "-vv", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    passed = re.findall(r"^tests/contracts/(\w+)\.py::.* PASSED", done.stdout, re.MULTILINE)
    for name, least in SUITES.items():  # only the copy has toys, so that the copy was imported
        assert passed.count(name) >= least, (name, passed.count(name))
    summary = done.stdout.strip().splitlines()[-1]
    assert re.search(rf"\b{len(passed)} passed", summary), summary
    assert not re.search("failed|skipped|error", summary), summary


# what may say a variant's name outside of its file: a default that a user sees, and the project's own name
NAMED_ELSEWHERE = {
    ("surgery/hosting/graph_surgery.py", "sspace"),  # of the submodule that holds the sites of a graph
}


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
            if not place.startswith("surgery/variants/"):
                found |= {(place, name) for name in names & words_of(path.read_text(encoding="utf-8"))}
    assert found == NAMED_ELSEWHERE


def test_no_variant_knows_another():
    for cls in REGISTRY.values():
        others = {name for other in REGISTRY.values() if other is not cls for name in (other.name, other.__name__)}
        assert not others & words_of(Path(sys.modules[cls.__module__].__file__).read_text(encoding="utf-8"))
