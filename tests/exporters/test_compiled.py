"""``exporters.compiled``: the graph after the pipeline, compiled; never recompiled for a coeff or a core, and right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from exporters import ExportError, compiled
from surgery import InputError, SurgeryError, refresh, set_coeff, sites, steer, to_graph
from tests.support.onnx_models import operated
from tests.support.program_models import shaken, with_variant
from tests.support.tolerance import RELATIVE, assert_close, relative_error
from tests.support.zoo import small_model

MODES = [("live", "delta", False), ("live", "residual", False), ("live", "delta", True)]
MODES += [("folded", "residual", False), ("folded", "residual", True), ("folded", "delta", False)]
MODES += [("merged", "residual", False), ("merged", "delta", True)]


@pytest.mark.matrix
@pytest.mark.parametrize(("mode", "form", "fuse"), MODES)
@pytest.mark.parametrize("name", ["mlp", "raw", "attention"])
def test_every_stage_agrees(name: str, mode: str, form: str, fuse: bool) -> None:
    p = operated(name)
    program = compiled(p.model, p.inputs, form=form, mode=mode, fuse=fuse, verify=True, backend="eager", fullgraph=True)
    assert_close(p.run(program), p.run(), torch.float32)
    assert bool(sites(program)) == (mode != "merged")
    if mode != "merged":
        set_coeff(program, -0.5)
        with steer(p.model, -0.5):
            assert_close(p.run(program), p.run())


@pytest.mark.parametrize("mode", ["live", "folded"])
@pytest.mark.parametrize("name", ["mlp", pytest.param("qwen3", marks=pytest.mark.full)])
def test_neither_coeff_nor_core_recompiles(name: str, mode: str) -> None:
    p, counter = operated(name), CompileCounter()
    program = compiled(p.model, p.inputs, mode=mode, verify=True, backend=counter)
    assert counter.frame_count == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for coeff in (0.5, -1.0, 0.0):
            set_coeff(program, coeff)
            with steer(p.model, coeff):
                assert_close(p.run(program), p.run())
        set_coeff(program, 1.0)
        shaken(p)  # its cores are the model's own
        assert_close(p.run(program), p.run())
        for site in sites(p.model).values():
            site.core.g.data = torch.full_like(site.core.g, -0.3)
        for site in sites(program).values():
            site.core.g.data = torch.full_like(site.core.g, -0.3)
        refresh(p.model)
        assert_close(p.run(program), p.run())
    assert counter.frame_count == 1


@pytest.mark.parametrize("base_first", [True, False])
def test_base_and_operated_model_in_one_process(base_first: bool) -> None:
    base, found = small_model("mlp"), operated("mlp")
    expected = {id(base): base.run(), id(found): found.run()}
    assert relative_error(expected[id(found)], expected[id(base)]) > 2 * RELATIVE[torch.float32]
    programs: dict[int, Any] = {}
    for each in (base, found) if base_first else (found, base):
        operation = each is found
        programs[id(each)] = (
            compiled(each.model, each.inputs, mode="live", backend="eager")
            if operation
            else torch.compile(each.model, backend="eager")
        )
    for each in (base, found, base):
        assert_close(each.run(programs[id(each)]), expected[id(each)])


@pytest.mark.parametrize("name", ["mlp", pytest.param("qwen3", marks=pytest.mark.full)])
def test_by_inductor(name: str) -> None:
    p = operated(name)
    program = compiled(p.model, p.inputs, mode="folded", fuse=True, form="residual", verify=True)
    assert_close(p.run(program), p.run())
    set_coeff(program, 0.25)
    with steer(p.model, 0.25):
        assert_close(p.run(program), p.run())


def test_a_hub_model_with_its_default_inputs() -> None:
    p = operated("gpt2")
    program = compiled(p.model, mode="live", backend="eager")
    inputs = {"input_ids": p.inputs["input_ids"]}
    assert_close(p.run(program, inputs), p.run(inputs=inputs))


@pytest.mark.parametrize("variant", ["sspace", "antipasto_rot"])
def test_variants(variant: str) -> None:
    p = with_variant(variant)
    program = compiled(p.model, p.inputs, mode="live", backend="eager")
    set_coeff(program, 0.3)
    with steer(p.model, 0.3):
        assert_close(p.run(program), p.run())


def test_the_default_is_the_merged_model_as_in_every_export() -> None:
    p = operated("mlp")
    program = compiled(p.model, p.inputs, backend="eager")
    assert not sites(program)
    assert_close(p.run(program), p.run())


def test_the_model_stays_what_it_was_and_a_graph_will_do() -> None:
    p = operated("mlp")
    before = {name: (id(t), t.clone()) for name, t in p.model.state_dict(keep_vars=True).items()}
    graph = to_graph(p.model, p.inputs)
    program = compiled(graph, p.inputs, mode="merged", backend="eager")
    assert_close(p.run(program), p.run())
    assert sites(graph)
    after = p.model.state_dict(keep_vars=True)
    assert all(id(after[name]) == found[0] and torch.equal(after[name], found[1]) for name, found in before.items())


def test_refusals() -> None:
    p = operated("mlp")
    with pytest.raises(ExportError, match="mode must be one of live, folded, merged"):
        compiled(p.model, p.inputs, mode="fast")
    with pytest.raises(SurgeryError, match="carries no surgery"):
        compiled(small_model("mlp").model, p.inputs)
    with pytest.raises(InputError, match="'delta' or 'residual'"):
        compiled(p.model, p.inputs, form="other")

    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(out * 1.01 for out in graph(*args))

    for mode in ("live", "merged"):
        for verify in (True, p.inputs):
            with pytest.raises(ExportError, match="differs from the model"):
                compiled(p.model, p.inputs, mode=mode, verify=verify, backend=wrong)
    with pytest.raises(InputError, match="verify must be True, False, or example inputs"):
        compiled(p.model, p.inputs, verify="yes", backend="eager")
