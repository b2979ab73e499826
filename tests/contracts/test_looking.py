"""Every verb that runs a model's forward leaves it as if nobody had looked: whether it had run before, or not."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import surgery
from exporters import export
from surgery import SurgeryError
from tests.support.described import described
from tests.support.traces import SIZE, TRACES, Traces

X = torch.linspace(-1, 1, 4 * SIZE).reshape(4, SIZE)
TARGETS = ["first", "second"]
ALL = [name for name in TRACES if name != "lazy_layer"]  # with which a model is refused until it has run
# A forward that leaves all traces cannot be captured; one that leaves these can.
CAPTURED = ["attribute", "nested_list", "queue", "rows_of_an_embedding", "attribute_of_a_tensor", "modes"]


def operated(names: list[str], **options: Any) -> Traces:
    torch.manual_seed(0)
    chosen = {"r": 2, "target_modules": TARGETS, "example_inputs": X, "progress": False}
    return surgery.apply_surgery(Traces(names), "antipasto", **(chosen | options))


def inspects(model: nn.Module, path: Any) -> None:
    surgery.inspect_sites(model, X)


def operates(model: nn.Module, path: Any) -> None:
    surgery.undo_surgery(
        surgery.apply_surgery(
            model, "antipasto", r=2, target_modules=TARGETS, example_inputs=X, progress=False, lowering="measure"
        )
    )


def operates_on_data(model: nn.Module, path: Any) -> None:
    options: Any = {"r": 2, "target_modules": TARGETS, "progress": False}
    surgery.apply_surgery(model, "antipasto_corda", calibration=[X, 2 * X], **options)
    surgery.undo_surgery(surgery.recalibrate(model, [3 * X], progress=False))


def calibrates(model: nn.Module, path: Any) -> None:
    surgery.calibrate(model, "antipasto_corda", [X], r=2, target_modules=TARGETS, progress=False)


def contrasts(model: nn.Module, path: Any) -> None:
    data = surgery.Contrast([X], [-X], pool="all")
    surgery.calibrate(model, "sspace", data, r=2, target_modules=["first"], progress=False)


PLAIN = [inspects, operates, operates_on_data, calibrates, contrasts]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("look", PLAIN)
def test_verbs_on_a_model_that_leaves_every_trace(look, before, tmp_path):
    model = Traces(ALL)
    for _ in range(before):
        model.eval()(X.clone())
    was = described(model)
    look(model, tmp_path)
    assert described(model) == was


def graphs(model: nn.Module, path: Any) -> None:
    surgery.to_graph(model, X, verify=True)


def exports_a_program(model: nn.Module, path: Any) -> None:
    export(model, "pt2", path / "model.pt2", example_inputs=X)


def exports_a_script(model: nn.Module, path: Any) -> None:
    export(model, "torchscript", path / "model.pt", example_inputs=X)


def exports_a_lora(model: nn.Module, path: Any) -> None:
    export(model, "lora", path / "lora", example_inputs=X)


OPERATED = [graphs, exports_a_program, exports_a_script, exports_a_lora]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [CAPTURED, ALL], ids=["captured", "all"])
@pytest.mark.parametrize("look", OPERATED)
def test_verbs_on_an_operated_model(look, names, tmp_path):
    model = operated(names)
    was = without_caches(model)
    # not every trace can be captured, or agrees with a second run
    with contextlib.suppress(*[] if names is CAPTURED else [SurgeryError]):
        look(model, tmp_path)
    assert without_caches(model) == was


def without_caches(model: nn.Module) -> list[str]:
    """Without what adapters have derived and checked, which a verb may do anew."""
    return [line for line in described(model) if not any(own in line for own in (".staleness.", ".record."))]


class Building(nn.Module):
    """Builds one layer in its first forward, and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "built"):
            self.built = nn.Linear(SIZE, 3)
            new = nn.Linear(SIZE, SIZE)
            new.weight = self.second.weight
            self.second = new
        return self.built(self.second(self.first(x)))


def test_layers_of_the_first_forward_are_no_sites_before_it():
    model = Building()
    found = surgery.inspect_sites(model, X)
    assert [site.key for site in found.sites] == ["first"]
    assert {skip.where for skip in found.skipped if "run the model once" in skip.reason} == {"second", "built"}
    assert not hasattr(model, "built")
    surgery.apply_surgery(model, "antipasto", r=2, example_inputs=X, progress=False)
    assert list(surgery.sites(model)) == ["first"]
    with pytest.raises(SurgeryError, match="run the model once"):
        surgery.apply_surgery(nn.Sequential(nn.LazyLinear(3)), "antipasto", example_inputs=X, progress=False)


def test_layers_of_the_first_forward_are_sites_after_it():
    model = Building()
    base = model(X)
    surgery.apply_surgery(model, "antipasto", r=2, example_inputs=X, progress=False)
    assert list(surgery.sites(model)) == ["first", "second", "built"]
    assert torch.equal(model(X), base)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def llava() -> tuple[Any, dict[str, torch.Tensor]]:
    vision = T.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)
    text = T.LlamaConfig(**SMALL, vocab_size=64)
    config = T.LlavaConfig(text_config=text, vision_config=vision, image_token_index=62, image_seq_length=16)
    ids = torch.cat([IDS[:, :3], torch.full((2, 16), 62), IDS[:, 3:]], 1)
    return T.LlavaForConditionalGeneration(config).eval(), {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 32, 32),
    }


def bert() -> tuple[Any, dict[str, torch.Tensor]]:
    config = T.BertConfig(**SMALL, vocab_size=64, output_hidden_states=True, output_attentions=True)
    config._attn_implementation = "eager"
    return T.BertModel(config).eval(), {"input_ids": IDS}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("make", [bert, llava])
def test_hooks_that_transformers_installs_in_the_first_forward(make, ran):
    model, inputs = make()
    untouched = type(model)(model.config).eval()
    untouched.load_state_dict(model.state_dict())
    expected = untouched(**inputs, output_hidden_states=True)
    if ran:
        model(**inputs, output_hidden_states=True)
    was = described(model)
    surgery.inspect_sites(model, inputs)
    surgery.calibrate(model, "antipasto_corda", [inputs], r=4, progress=False)
    assert described(model) == was
    surgery.apply_surgery(model, "antipasto", r=4, example_inputs=inputs, progress=False)
    for _ in range(2):
        same(model(**inputs, output_hidden_states=True), expected)
    surgery.undo_surgery(model)
    for _ in range(2):
        same(model(**inputs, output_hidden_states=True), expected)


def same(found: Any, expected: Any) -> None:
    assert len(found.hidden_states) == 3
    for name in expected:
        if not isinstance(expected[name], T.Cache):
            one, other = ([v] if isinstance(v, torch.Tensor) else v for v in (found[name], expected[name]))
            assert all(map(torch.equal, one, other))
