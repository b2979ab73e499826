"""Where an exported LoRA finds its weights: experts, weights that a called module reads, tied ones, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from exporters import ExportError, export
from surgery import (
    AdapterError,
    InputError,
    VariantError,
    apply_surgery,
    load_adapter,
    sites,
    to_graph,
)
from tests.support import expert_models
from tests.support.peft_models import assert_same_in_peft, loaded, operate, operated, trained
from tests.support.tolerance import assert_close
from tests.support.zoo import Forward, SmallModel, small_model


@pytest.mark.parametrize("name", expert_models.BUILD)
def test_stacked_experts_are_target_parameters(name: str, tmp_path: Path) -> None:
    for variant in ("antipasto", surgery.AntiPaSTOAblate(r=4, k=1)):
        p = SmallModel(
            name, expert_models.operated(name, variant, target_modules="all-linear"), {"input_ids": expert_models.IDS}
        )
        trained(p.model)
        report = export(p.model, "lora", tmp_path / str(variant)[:9], example_inputs=p.inputs)
        config = json.loads((report.path / "adapter_config.json").read_text())
        assert f"{expert_models.EXPERTS}.gate_up_proj" in config["target_parameters"]
        assert_same_in_peft(p, lambda: expert_models.build(name), report.path)


def within(**members: Any) -> Any:
    """A model with one block, since PEFT wraps modules inside of a model."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        made = {name: member() for name, member in members.items()}
        return nn.Sequential(nn.Tanh(), Forward(members_forward, **made)).eval()

    def members_forward(self: nn.Module, x: torch.Tensor) -> Any:
        return forward(self, x)

    forward = members.pop("forward")
    return build


BLOCKS = {
    "raw": within(forward=lambda self, x: x @ self.w, w=lambda: nn.Parameter(torch.randn(8, 6))),
    "raw_out_in": within(
        forward=lambda self, x: nn.functional.linear(x, self.w), w=lambda: nn.Parameter(torch.randn(6, 8))
    ),
    "conv": within(forward=lambda self, x: self.c(x.T[None])[0].T, c=lambda: nn.Conv1d(8, 6, 1)),
    "kernel": within(
        forward=lambda self, x: self.c(x.view(5, 2, 2, 2)).flatten(1),
        c=lambda: nn.Conv2d(2, 6, (2, 1), stride=(1, 2), padding=(1, 0)),
    ),
    "kernel, same": within(
        forward=lambda self, x: self.c(x.T[None])[0].T, c=lambda: nn.Conv1d(8, 6, 3, padding="same")
    ),
    "in_proj": within(
        forward=lambda self, x: self.m(x[None], x[None], x[None])[0][0],
        m=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    ),
}
INSIDE = within(
    forward=lambda self, x: self.l(x @ self.w), w=lambda: nn.Parameter(torch.randn(8, 8)), l=lambda: nn.Linear(8, 6)
)
APART = within(
    forward=lambda self, x: torch.einsum("nd,dhk->nhk", x, self.w), w=lambda: nn.Parameter(torch.randn(8, 2, 3))
)


def convolution(**options: Any) -> Any:
    build = within(forward=lambda self, x: self.c(x.T[None])[0].T, c=lambda: nn.Conv1d(8, 6, 3, **options))
    return lambda: SmallModel("", build(), torch.randn(9, 8))


@pytest.mark.parametrize("name", BLOCKS)
def test_weights_that_a_called_module_reads(name: str, tmp_path: Path) -> None:
    p = SmallModel(name, BLOCKS[name](), torch.randn(5, 8))
    operate(p, "antipasto", r=4, exclude_modules=["out_proj"] if name == "in_proj" else None)
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert_same_in_peft(p, BLOCKS[name], report.path)


REFUSED = {
    "raw": (lambda: small_model("raw"), None, "'w': its weight is a parameter of the model itself"),
    "attention": (lambda: small_model("attention"), None, "1 of 2 .*'in_proj_weight': its weight is a parameter"),
    "in_proj": (
        lambda: SmallModel("", BLOCKS["in_proj"](), torch.randn(5, 8)),
        None,
        "cannot merge the site '1.m.out_proj'",
    ),
    "out_proj": (lambda: SmallModel("", BLOCKS["in_proj"](), torch.randn(5, 8)), ["m.in_proj_weight"], "never called"),
    "inside": (lambda: SmallModel("", INSIDE(), torch.randn(5, 8)), None, "cannot merge the site '1.l' inside of that"),
    "fast_path": (
        lambda: small_model("encoder_layer"),
        ".*self_attn.*",
        "linear1.weight, linear2.weight is never called",
    ),
    "attributes": (lambda: small_model("encoder_layer"), ".*(out_proj|linear.)", "does not run with PEFT's wrappers"),
    "groups": (convolution(groups=2), None, "'1.c': its 2 groups have factors each"),
    "dilated": (convolution(dilation=2), None, "'1.c': its kernel is dilated"),
    "padded": (convolution(padding=1, padding_mode="reflect"), None, "'1.c': its padding is 'reflect'"),
    "seen_apart": (lambda: SmallModel("", APART(), torch.randn(5, 8)), None, r"a weight of shape \(8, 2, 3\) as"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_has_no_place_for_is_listed(name: str, tmp_path: Path) -> None:
    build, excluded, match = REFUSED[name]
    p = operate(build(), exclude_modules=excluded)
    with pytest.raises(ExportError, match=f"{match}.*exclude_modules"):
        export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_adapted_in_their_place_only(tmp_path: Path) -> None:
    p = operated("qwen3", target_modules=["lm_head", "q_proj"])
    report = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert_close(loaded(p, small_model("qwen3").model, report.path), p.run())


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = operated("mlp")

    def refused(model: nn.Module, kind: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            export(model, "lora", tmp_path / "a", **{"example_inputs": p.inputs, **options})

    refused(small_model("mlp").model, ExportError, "carries none")
    refused(to_graph(p.model, p.inputs), ExportError, "inlined in a graph")
    for wrong in (0, -1, 1.5, True):
        refused(p.model, ExportError, "max_rank must be", max_rank=wrong)
    refused(p.model, ExportError, "prune_tol must be", prune_tol=1.0)
    refused(p.model, ExportError, "dtype must be", dtype=torch.int8)
    with surgery.steer(p.model, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])):
        refused(p.model, InputError, "site '0': coeff steers the rows")
    for site in sites(p.model).values():
        site.core.g.data[0] = float("nan")
    refused(p.model, ExportError, "site '0': .* not finite")
    big = operated("mlp")
    for site in sites(big.model).values():
        site.core.g.data += 1e6
    refused(big.model, ExportError, "site '0': its factors overflow", dtype=torch.float16)
    steered = small_model("mlp")
    contrast = surgery.Contrast([steered.inputs], [steered.inputs + 1])
    options = {"example_inputs": steered.inputs, "calibration": contrast, "target_modules": "all-linear"}
    apply_surgery(steered.model, "sspace", r=4, progress=False, **options)
    refused(steered.model, VariantError, "site '0': .*not linear")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(operated("mlp").model, ExportError, r"pip install .*\[lora\]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_are_off_by_a_hundredth_are_refused(
    factor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters.formats import lora as module

    def corrupt(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        name = next(name for name in tensors if f"lora_{factor}" in name)
        real({**tensors, name: tensors[name] * 1.01}, *args, **kwargs)

    real = module.save_file
    monkeypatch.setattr(module, "save_file", corrupt)
    p = operated("qwen3")
    with pytest.raises(ExportError, match="something else than was written"):
        export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs)
    assert list(tmp_path.iterdir()) == []


def test_our_loader_names_a_peft_directory(tmp_path: Path) -> None:
    p = operated("qwen3")
    path = export(p.model, "lora", tmp_path / "a", example_inputs=p.inputs).path
    before = p.run()
    with pytest.raises(AdapterError, match=r"is a PEFT adapter.*its own format only"):
        load_adapter(p.model, path)
    assert torch.equal(p.run(), before)
