"""Factors that data orients, against the singular value decomposition of ``W C^{1/2}`` in numpy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surgery import Contrast, apply_surgery, sites
from surgery.factors.oriented_svd import oriented
from surgery.factors.statistic import Statistic, contrasted, reranked, top
from tests.support.spectra import with_spectrum
from tests.support.tolerance import assert_close

SHAPES = ((6, 14), (14, 6), (9, 9), (1, 5), (5, 1), (1, 1))
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_kind = pytest.mark.parametrize("kind", ["moment", "squares", "output"])
F64, F32 = torch.float64, torch.float32


def statistic_of(kind: str, X: torch.Tensor, W: torch.Tensor) -> Statistic:
    """The statistic of inputs, added in three uneven parts; "output" is the moment of the product."""
    found = Statistic("squares" if kind == "squares" else "moment", "output" if kind == "output" else "input", len(W.T))
    found.weight = W if kind == "output" else None
    for part in (X[:1], X[1:8], X[8:]):
        found.add(part)
    found.weight = None
    return found


def inputs_of(d_in: int, n: int = 40, seed: int = 0) -> torch.Tensor:
    """Inputs whose directions have very different weight."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d_in, generator=generator, dtype=F64) * torch.logspace(0.5, -1, d_in, dtype=F64)
    return X @ torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=F64))[0]


def moment_of(kind: str, X: torch.Tensor) -> np.ndarray:
    x = X.numpy()
    C = x.T @ x / len(x)
    return np.diag(np.diag(C)) if kind == "squares" else C


def reference(W: torch.Tensor, C: np.ndarray, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``SVD(W C^{1/2})`` of full rank, and ``Vh C^{-1/2}``."""
    values, vectors = np.linalg.eigh(C)
    root, inverse = vectors * np.sqrt(values) @ vectors.T, vectors / np.sqrt(values) @ vectors.T
    U, S, Vh = np.linalg.svd(W.numpy() @ root, full_matrices=False)
    return tuple(torch.from_numpy(t) for t in (U[:, :r], S[:r], Vh[:r] @ inverse))  # type: ignore[return-value]


def check(found, W, C, r, dtype=F32):
    """Full tensors, up to the common sign of a direction."""
    U, S, P = reference(W, C, r)
    assert_close(found.S, S, dtype)
    assert_close(found.U * found.S @ found.Vh, U * S @ P, dtype)
    signs = torch.sign((found.U * U).sum(0))
    assert_close(found.U, U * signs, dtype)
    assert_close(found.Vh, P * signs[:, None], dtype)
    assert_close(found.U.T @ found.U, torch.eye(r, dtype=F64), dtype)
    assert_close(found.Vh @ torch.from_numpy(C) @ found.Vh.T, torch.eye(r, dtype=F64), dtype)
    assert_close(found.U * found.S @ found.Vh, found.U @ found.U.T @ W, dtype)
    assert_close(torch.tensor(found.energy), S.square().sum() / np.trace(W.numpy() @ C @ W.numpy().T), dtype)
    assert all(t.dtype == F64 and t.is_contiguous() for t in found[:3])
    assert max(found.error, found.residual) < 1e-8


@each_kind
@each_shape
@pytest.mark.parametrize("whole", [False, True])
def test_against_the_decomposition(shape, kind, whole):
    W, X = torch.randn(shape, dtype=F64), inputs_of(shape[1])
    r = min(shape) if whole else max(1, min(shape) // 2)
    C = moment_of(kind, X)
    check(oriented(W, r, statistic_of(kind, X, W), 0.0), W, C, r)
    check(oriented(W, r, statistic_of(kind, X, W), 1e-3), W, C + 1e-3 * np.eye(len(C)), r)
    share = 1e-2 * np.diag(C).mean()
    relative = oriented(W, r, statistic_of(kind, X, W), 1e-2, relative=True)
    check(relative, W, C + share * np.eye(len(C)), r)


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 16), st.integers(-8, 8), st.integers(-8, 8))
def test_any_shape_and_scale(d_out, d_in, r, wide, loud):
    generator = torch.Generator().manual_seed(d_out * d_in)
    W = torch.randn(d_out, d_in, generator=generator, dtype=F64) * 10.0**wide
    X, r = inputs_of(d_in) * 10.0**loud, min(r, d_out, d_in)
    found = oriented(W, r, statistic_of("moment", X, W), 0.0)
    U, S, P = reference(W, moment_of("moment", X), r)
    assert_close(found.S, S, F32)
    assert_close(found.U * found.S @ found.Vh, U * S @ P, F32)


@pytest.mark.parametrize("span", [0, 1, 3])
@each_kind
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 8)])
def test_inputs_in_a_subspace(shape, kind, span):
    r = 6
    W, X = torch.randn(shape, dtype=F64), torch.zeros(40, shape[1], dtype=F64)
    X[:, :span] = torch.randn(40, span, dtype=F64)  # along axes, so that the diagonal is singular too
    found = oriented(W, r, statistic_of(kind, X, W), 0.0)
    assert all(torch.isfinite(t).all() for t in found[:3])
    assert np.isfinite([found.error, found.residual, found.energy]).all()
    assert_close(found.U.T @ found.U, torch.eye(r, dtype=F64), F32)
    assert torch.equal(found.Vh[span:], torch.zeros_like(found.Vh[span:]))
    assert found.Vh[:span].any(dim=1).all()
    C = moment_of(kind, X)
    values, vectors = np.linalg.eigh(C)
    U, S, _ = np.linalg.svd(W.numpy() @ (vectors * np.sqrt(values.clip(0))), full_matrices=False)
    S = torch.from_numpy(np.pad(S, (0, r))[:r])
    assert_close(found.S, S, F32)
    kept = torch.from_numpy(U[:, :span])
    assert_close(found.U * found.S @ found.Vh, kept @ kept.T @ W, F32)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@each_kind
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 8)])
def test_a_weight_of_zeros(shape, kind, eps):
    W = torch.zeros(shape, dtype=F64)
    found = oriented(W, 5, statistic_of(kind, inputs_of(shape[1]), W), eps)
    assert torch.equal(found.S, torch.zeros(5, dtype=F64))
    assert torch.equal(found.Vh, torch.zeros(5, shape[1], dtype=F64))
    assert_close(found.U.T @ found.U, torch.eye(5, dtype=F64), F32)


@pytest.mark.parametrize("exponent", [-3, -5, -5.9, -6, -9])
@pytest.mark.parametrize("shape", [(60, 30), (30, 60), (30, 30)])
def test_orthonormal_however_wide_the_spectrum(shape, exponent):
    n = min(shape)
    W = with_spectrum(*shape, torch.logspace(0, exponent, n, dtype=F64))
    found = oriented(W, n, statistic_of("moment", torch.randn(200, shape[1], dtype=F64), W), 0.0)
    assert all(torch.isfinite(t).all() for t in found[:3])
    assert_close(found.U.T @ found.U, torch.eye(n, dtype=F64), F32)
    assert_close(found.U * found.S @ found.Vh, found.U @ found.U.T @ W, F32)


@pytest.mark.parametrize("variant", ["antipasto_corda", "antipasto_asvd"])
@pytest.mark.parametrize("shape", [(6, 14), (14, 6), (9, 9)])
def test_the_variants_take_them(shape, variant):
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).double()
    X = inputs_of(shape[1])
    W = model[0].weight.detach().clone()
    apply_surgery(model, variant, r=4, calibration=[X[:9], X[9:]], progress=False)
    C = moment_of("squares" if variant == "antipasto_asvd" else "moment", X) + 1e-3 * np.eye(shape[1])
    U, S, P = reference(W, C, 4)
    factors = sites(model)["0"].factors
    assert_close(factors.S, S, F32)
    assert_close(factors.U * factors.S @ factors.Vh, U * S @ P, F32)


@pytest.mark.parametrize("kind", ["moment", "output", "absolute"])
@each_shape
def test_reranked_keeps_what_carries_most(shape, kind):
    W, X = torch.randn(shape, dtype=F64), inputs_of(shape[1])
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    projections = np.abs(X.numpy() @ Vh.T)
    pooled = projections.mean(0) if kind == "absolute" else np.sqrt((projections**2).mean(0))
    r = max(1, len(S) // 2)
    chosen = np.sort(np.argsort(-S * pooled, kind="stable")[:r])
    statistic = statistic_of(kind, X, W)
    if kind == "absolute":
        statistic = Statistic(kind, "output", shape[1], torch.from_numpy(S[:, None] * Vh))
        statistic.add(X)
    found = reranked(W, r, statistic)
    assert_close(found.S, torch.from_numpy(S[chosen]))
    assert_close(found.U * found.S @ found.Vh, torch.from_numpy(U[:, chosen] * S[chosen] @ Vh[chosen]))
    assert_close(torch.tensor(found.energy), torch.tensor((S[chosen] ** 2).sum() / (S**2).sum()), F32)


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_contrast_with_zero_singular_values(shape, rank):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape[0], rank, generator=generator, dtype=F64) @ torch.randn(rank, shape[1], dtype=F64)
    positive, negative = torch.randn(11, shape[1], dtype=F64), torch.randn(7, shape[1], dtype=F64)
    statistic = Statistic("contrast", "input", shape[1])
    statistic.add(positive, "positive")
    statistic.add(negative, "negative")
    found = contrasted(W, 4, statistic)
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    S[rank:] = 0
    dS = np.sqrt(S) * (Vh @ (positive.mean(0) - negative.mean(0)).numpy())
    chosen = np.sort(np.argsort(-np.abs(dS), kind="stable")[:4])[: min(rank, 4)]
    direction = dS[chosen] / np.linalg.norm(dS[chosen])
    assert int((found.S > 1e-9).sum()) == len(chosen)
    steer = found.U @ (found.S.sqrt() * found.core["direction"])
    assert_close(steer, torch.from_numpy(U[:, chosen] @ (np.sqrt(S[chosen]) * direction)), F32)
    assert_close(torch.linalg.vector_norm(found.core["direction"]), torch.ones((), dtype=F64))
    assert torch.isfinite(found.core["direction"]).all()


def test_top_takes_the_first_of_equals():
    assert top(torch.tensor([1.0, 2, 2, 2, 0]), 2).tolist() == [1, 2]
    assert top(torch.zeros(4), 3).tolist() == [0, 1, 2]


def test_pooled_contrast_steers_a_model_as_its_equation_says():
    model, r = nn.Sequential(nn.Linear(7, 5, bias=False)).double(), 3
    positive, negative = torch.randn(4, 6, 7, dtype=F64), torch.randn(5, 6, 7, dtype=F64)
    W = model[0].weight.detach().numpy().copy()
    contrast = Contrast([positive], [negative], pool="mean")
    apply_surgery(model, "sspace", r=r, target_modules="all-linear", calibration=contrast, progress=False)
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    dS = np.sqrt(S) * (Vh @ (positive.mean((0, 1)) - negative.mean((0, 1))).numpy())
    i = np.sort(np.argsort(-np.abs(dS))[:r])
    d = dS[i] / np.linalg.norm(dS[i])
    x = np.random.default_rng(0).normal(size=(3, 7))
    a = x @ Vh[i].T * np.sqrt(S[i])
    gate = a @ d / np.linalg.norm(a, axis=-1)
    expected = x @ W.T + gate[:, None] * (np.sqrt(S[i]) * d) @ U[:, i].T
    with torch.no_grad():
        assert_close(model(torch.from_numpy(x)), torch.from_numpy(expected))
