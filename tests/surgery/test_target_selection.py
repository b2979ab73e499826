"""Which sites a call chooses: PEFT's rules checked against PEFT itself, and what the messages say."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

import surgery
from passes.analysis.linear_sites import Site
from passes.capture.inspect_model import Inspection
from surgery.planning.target_selection import output_head, select_sites, site_ranks
from tests.support.zoo import ALL_NAMES, HUB_NAMES, small_model

ANTIPASTO = surgery.AntiPaSTO()
# fmt: off
SUFFIXES = (
    "q_proj", "v_proj", "mlp.up_proj", "c_attn", "attn.c_proj", "dense", "output.dense", "query", "fc1", "wo", "o", "0",
    "SelfAttention.q", "0.SelfAttention.q", "in_proj_weight", "out_proj", "linear2", "w", "out", "2", "4", "proj",
    "model.layers.1.mlp.up_proj", "encoder.block.0.layer.0.SelfAttention.v", "lm_head", "",
)
EXPRESSIONS = (
    r".*", r".*q_proj", r"q_proj", r".*\.(q|k|v)(_proj)?", r".*layers?\.1\..*", r"model.*[qk]_proj", r"[024]", r"",
    r".*attn.*|.*attention.*", r"(?i).*SELFATTENTION.*", r".*dense$", r"decoder\..*\.wi", r"linear\d",
)
# fmt: on
RESIDUAL = {
    "mlp": set(),
    "attention": set(),
    "encoder_layer": {"self_attn.out_proj", "linear2"},
    "raw": {"v"},
    "qwen3": {"o_proj", "down_proj"},
    "llama": {"o_proj", "down_proj"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "bert": {"attention.output.dense", "output.dense"},
    "vit": {"o_proj", "fc2"},
    "t5": {"o", "wo"},
}


@functools.cache
def inspected(name: str) -> tuple[nn.Module, Inspection]:
    found = small_model(name)
    return found.model, surgery.inspect_sites(found.model, found.inputs)


def inspection_of(*keys: str) -> Inspection:
    return Inspection(tuple(Site(key, f"{key}.weight", None, "out_in", 8, 6) for key in keys), (), "torch.export")


@functools.cache
def every_site() -> Inspection:
    """The sites of all small models as if they were one model's."""
    return inspection_of(*dict.fromkeys(site.key for name in ALL_NAMES for site in inspected(name)[1].sites))


def chosen(
    inspection: Inspection,
    model: nn.Module | None = None,
    config: surgery.AntiPaSTO | surgery.AntiPaSTOAblate = ANTIPASTO,
    **options,
) -> list[str]:
    """Keys that a call chooses; none where it raises."""
    options = {"target_modules": None, "exclude_modules": None, "layers_to_transform": None, **options}
    try:
        with warnings.catch_warnings(action="ignore"):
            return [site.key for site in select_sites(model or nn.Module(), inspection, config=config, **options)]
    except surgery.TargetError:
        return []


def chosen_by_peft(inspection: Inspection, **options) -> list[str]:
    config = LoraConfig(**options)
    return [site.key for site in inspection.sites if check_target_module_exists(config, site.key)]


def assert_as_peft(inspection: Inspection, **options) -> None:
    assert chosen(inspection, **options) == chosen_by_peft(inspection, **options)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffix_as_peft(suffix):
    assert_as_peft(every_site(), target_modules=[suffix])


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_as_peft(expression):
    assert_as_peft(every_site(), target_modules=expression)


@pytest.mark.parametrize("exclude", ["q_proj", r".*\.1\..*", ["o_proj", "wo"], ["0.mlp.fc1", "w", "0"], [], ""])
def test_exclusion_as_peft(exclude):
    assert_as_peft(every_site(), target_modules=".*", exclude_modules=exclude)


@pytest.mark.parametrize("layers", [None, 0, 1, [0], [1, 0], [7], []])
def test_layers_as_peft(layers):
    keys = [site.key for site in every_site().sites]
    suffixes = [suffix for suffix in SUFFIXES if suffix not in keys]
    assert_as_peft(every_site(), target_modules=suffixes, layers_to_transform=layers)


@given(st.data())
def test_any_lists_as_peft(data):
    keys = tuple(site.key for site in every_site().sites)
    words = st.lists(st.sampled_from(SUFFIXES + keys), min_size=1, max_size=4)
    layers = data.draw(st.none() | st.integers(0, 1) | st.lists(st.integers(0, 2), max_size=2))
    options = {"target_modules": data.draw(words), "exclude_modules": data.draw(st.none() | words)}
    assert_as_peft(every_site(), layers_to_transform=layers, **options)


def test_a_key_that_is_named_in_full_is_chosen_whatever_its_layer_as_in_peft():
    inspection = inspection_of("model.layers.0.mlp", "model.layers.1.mlp", "head")
    assert_as_peft(inspection, target_modules=["model.layers.0.mlp", "head"], layers_to_transform=1)


def test_the_layer_is_the_first_index_and_not_the_expert():
    inspection = inspection_of(*(f"model.layers.{i}.experts.{j}.up" for i in (0, 1) for j in (0, 1, 2)))
    assert_as_peft(inspection, target_modules=["up"], layers_to_transform=1)
    assert len(chosen(inspection, target_modules=["up"], layers_to_transform=1)) == 3


@pytest.mark.parametrize("patterns", [{"q_proj": 2}, {r"layers.1.*k_proj": 3, "k_proj": 4}, {"v_proj$": 2, ".*proj": 5},
                                      {"model.layers.0.self_attn.q_proj": 1, "o_proj|up_proj": 6}])  # fmt: skip
def test_rank_pattern_as_peft(patterns):
    sites = [site for site in inspected("qwen3")[1].sites if site.key != "lm_head"]
    ranks = site_ranks(sites, surgery.AntiPaSTO(r=7), patterns)
    assert ranks == {site.key: patterns.get(get_pattern_key(patterns, site.key), 7) for site in sites}


def test_rank_is_an_upper_bound():
    ranks = site_ranks(inspected("mlp")[1].sites, surgery.AntiPaSTO(r=15), None)
    assert ranks == {"0": 12, "2": 15, "4": 6}


@pytest.mark.parametrize("rank", [0, -1, 13, True, 2.0, "4"])
def test_a_rank_pattern_that_its_site_cannot_have_is_refused(rank):
    with pytest.raises(surgery.RankError, match=r"rank_pattern\['0'\] = .*, but site '0' allows 1 to 12"):
        site_ranks(inspected("mlp")[1].sites, surgery.AntiPaSTO(), {"0": rank})


def test_a_rank_pattern_that_matches_nothing_is_refused():
    with pytest.raises(surgery.TargetError, match="rank_pattern 'nothing' matches no chosen site"):
        site_ranks(inspected("mlp")[1].sites, surgery.AntiPaSTO(), {"0": 3, "nothing": 3})


def test_a_rank_pattern_that_is_no_expression_is_refused():
    with pytest.raises(surgery.TargetError, match=r"\(.* is not a regular expression"):
        site_ranks(inspected("mlp")[1].sites, surgery.AntiPaSTO(), {"(": 3})


@pytest.mark.parametrize("name", ALL_NAMES)
def test_all_linear_leaves_out_tied_weights_and_the_head(name):
    model, inspection = inspected(name)
    keys = chosen(inspection, model)
    left_out = {site.key for site in inspection.sites} - set(keys)
    assert left_out == ({"classifier"} if name in ("bert", "vit") else {"lm_head"} if name in HUB_NAMES else set())
    assert not any(site.tied for site in inspection.sites if site.key in keys)


def test_the_head_of_a_classifier_is_all_that_is_outside_its_base_model():
    model, inspection = inspected("bert")
    assert output_head(model, [site.key for site in inspection.sites]) == {"classifier"}
    assert output_head(nn.Sequential(nn.Linear(2, 2)), ["0"]) == set()


@pytest.mark.parametrize("name", ALL_NAMES)
def test_residual_writers_are_found_from_dataflow(name):
    model, inspection = inspected(name)
    keys = chosen(inspection, model, target_modules="residual-writers")
    expected = [k for k in chosen(inspection, model) if any(k == s or k.endswith(f".{s}") for s in RESIDUAL[name])]
    assert keys == expected
    assert len(keys) >= len(RESIDUAL[name])


def test_residual_writers_need_a_graph():
    inspection = Inspection(inspection_of("a").sites, (), "module walk", ("not captured: no reason",))
    with pytest.raises(surgery.CaptureError, match="not captured: no reason"):
        chosen(inspection, target_modules="residual-writers")


def test_the_default_is_the_variants_own():
    model, inspection = inspected("raw")
    assert chosen(inspection, model, surgery.AntiPaSTOAblate()) == ["v"]


def test_a_tied_head_that_is_named_is_chosen():
    assert chosen(inspected("gpt2")[1], target_modules=["lm_head"]) == ["lm_head"]


def select(name: str = "qwen3", **options) -> list[Site]:
    model, inspection = inspected(name)
    options = {"exclude_modules": None, "layers_to_transform": None, "config": surgery.AntiPaSTO(), **options}
    return select_sites(model, inspection, **options)


@pytest.mark.parametrize("target", [["q_porj"], "q_porj"])
def test_a_pattern_that_matches_nothing_shows_near_misses_and_what_exists(target):
    with pytest.raises(surgery.TargetError, match="no site matches 'q_porj'; did you mean 'q_proj'") as caught:
        select(target_modules=target)
    assert "model.layers.*.mlp.down_proj" in str(caught.value)


class Named(nn.Module):
    """Parts that a user may name, and that are no sites."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.proj = nn.ConvTranspose1d(4, 4, 1), nn.Linear(4, 4)
        self.table, self.norm, self.scale = nn.Embedding(4, 4), nn.LayerNorm(4), nn.Parameter(torch.ones(4, 4))
        self.block = nn.ModuleDict({"proj": nn.ConvTranspose1d(4, 4, 1), "inner": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x.T[None])[0].T
        y = self.block["inner"](self.block["proj"](y.T[None])[0].T)
        return self.norm(self.proj(y)) * self.scale[0] + self.table.weight[0]


ASKED = {
    "up": "'up' is no site: conv_transpose1d with a parameter: a transposed convolution",
    "up.weight": "'up' is no site: conv_transpose1d",
    "table": "'table' is no site: it is a module of class Embedding and no product itself",
    "norm": "'norm' is no site: it is a module of class LayerNorm",
    "scale": r"'scale' is no site: this parameter \(4x4\) was found in no product",
    "norm.weight": r"'norm.weight' is no site: this parameter \(4\) was found in no product",
    "block": "'block' is no site: it is a module of class ModuleDict and no product itself, but contains block.inner",
}


@pytest.mark.parametrize("name", ASKED)
def test_a_name_that_is_no_site_is_answered_with_the_reason(name):
    for target in ([name], re.escape(name)):
        with pytest.raises(surgery.TargetError, match=ASKED[name]):
            surgery.apply_surgery(
                Named(), "antipasto", target_modules=target, example_inputs=torch.randn(3, 4), progress=False
            )
    with pytest.warns(UserWarning, match=ASKED[name]):
        model = surgery.apply_surgery(
            Named(), "antipasto", target_modules=["inner", name], example_inputs=torch.randn(3, 4), progress=False
        )
    assert list(surgery.sites(model)) == ["block.inner"]


def test_a_name_that_also_names_what_is_no_site_warns():
    with pytest.warns(UserWarning, match="'proj' also names 'block.proj', which is no site: conv_transpose1d"):
        model = surgery.apply_surgery(
            Named(), "antipasto", target_modules=["proj"], example_inputs=torch.randn(3, 4), progress=False
        )
    assert list(surgery.sites(model)) == ["proj"]


def test_a_name_in_a_model_without_sites_is_answered_with_the_reason():
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 1), nn.LayerNorm(5))
    for name, reason in {"0": "a transposed convolution", "1": "a module of class LayerNorm"}.items():
        with pytest.raises(surgery.TargetError, match=f"'{name}' is no site: .*{reason}"):
            surgery.apply_surgery(
                model, "antipasto", target_modules=[name], example_inputs=torch.randn(2, 4, 5), progress=False
            )


def test_a_list_that_matches_in_part_warns_where_it_was_called():
    found = small_model("mlp")
    with pytest.warns(UserWarning, match="no site matches 'nothing'") as record:
        surgery.apply_surgery(found.model, "antipasto", target_modules=["0", "nothing"], progress=False)
    assert record[0].filename == __file__
    assert list(surgery.sites(found.model)) == ["0"]


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_is_refused(empty):
    with pytest.raises(surgery.TargetError, match="empty list"):
        select(target_modules=empty)


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
def test_a_string_that_is_no_expression_is_refused(argument):
    with pytest.raises(surgery.TargetError, match=r"'\*_proj' is not a regular expression"):
        select(**{"target_modules": ".*", argument: "*_proj"})


@pytest.mark.parametrize("options", [{"exclude_modules": ".*"}, {"layers_to_transform": 9}])
def test_a_choice_that_leaves_nothing_names_its_arguments(options):
    with pytest.raises(surgery.TargetError, match="leaves no site") as caught:
        select(target_modules=["q_proj"], **options)
    assert repr(next(iter(options.values()))) in str(caught.value)
    assert "q_proj" in str(caught.value)


def test_a_model_without_linear_operations_says_so():
    model = nn.Sequential(nn.ReLU(), nn.ConvTranspose1d(2, 2, 3))
    with pytest.raises(surgery.TargetError, match=r"Sequential has no linear operation .*conv_transpose1d"):
        surgery.apply_surgery(model, "antipasto", example_inputs=torch.randn(1, 2, 3), progress=False)


@pytest.mark.parametrize(("layers", "middle"), [(1, [0]), (2, [0, 1]), (3, [1]), (4, [1, 2]), (30, [*range(10, 20)])])
def test_steering_variants_take_the_middle_third_of_the_layers(layers, middle):
    inspection = inspection_of(*(f"model.layers.{i}.mlp.up_proj" for i in range(layers)))
    options = {"exclude_modules": None, "target_modules": None, "layers_to_transform": None}
    config = surgery.SSpace()
    everywhere = inspection_of("a", "b")
    with_writers = [dataclasses.replace(site, residual=True) for site in (*inspection.sites, *everywhere.sites)]
    known = Inspection(tuple(with_writers), (), "torch.export")
    for chosen_by in (config, surgery.SSpaceScale()):
        keys = [site.key for site in select_sites(nn.Module(), known, config=chosen_by, **options)]
        assert keys == [f"model.layers.{i}.mlp.up_proj" for i in middle]
        named = {**options, "layers_to_transform": 0}
        keys = [site.key for site in select_sites(nn.Module(), known, config=chosen_by, **named)]
        assert keys == ["model.layers.0.mlp.up_proj"]
    flat = Inspection(tuple(with_writers[-2:]), (), "torch.export")
    assert [site.key for site in select_sites(nn.Module(), flat, config=config, **options)] == ["a", "b"]
