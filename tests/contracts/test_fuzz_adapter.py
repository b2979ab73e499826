"""Adapters that were damaged at random: a typed error or an adapter that works, and the model as it was."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporters import swap
from exporters.program.metadata import FORMAT, contents
from surgery import AdapterError, VariantError, load_adapter, sites, undo_surgery
from surgery.storage.adapter_file import TENSORS
from surgery.variants import REGISTRY
from tests.support.adapter_files import header_size, signed, with_configuration
from tests.support.fuzz import (
    MANY,
    SOME,
    WRONG,
    damaged_bytes,
    damaged_json,
    outcome,
    places,
    safetensors_file,
    written,
)
from tests.support.fuzz_adapter import saved
from tests.support.model_state import state_of
from tests.support.operated_models import operated
from tests.support.zoo import SmallModel, small_model

NAMES = ("mlp", "raw", "attention")


@functools.cache
def fresh(name: str) -> SmallModel:
    return small_model(name)


def check_load(name: str, config: Any, tensors: bytes, *, sign: bool = True) -> bool:
    """Load the adapter, in the present format and in the older one; whether both were taken.

    Either way the model is what it was, in the end.
    """
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        taken = check_folder(name, written(Path(one), config, tensors, sign=sign))
        older = check_folder(name, written(Path(other), config, tensors, sign=sign, older=True))
    return taken and older


def check_folder(name: str, folder: Path) -> bool:
    model = fresh(name).model
    before = state_of(model)
    error = outcome(lambda: load_adapter(model, folder))
    if error is None:
        assert sites(model)
        fresh(name).run()
        undo_surgery(model)
    else:
        assert isinstance(error, AdapterError)
    assert sites(model) == {}
    assert state_of(model) == before
    return error is None


@MANY
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_damaged_tensors_whose_digest_was_made_to_fit(data, name):
    config, tensors = saved(name)
    check_load(name, config, data.draw(damaged_bytes(tensors)))


@MANY
@given(data=st.data(), name=st.sampled_from(NAMES), sign=st.booleans())
def test_a_damaged_file(data, name, sign):
    """Bytes of the file as it is, of the header with its configuration or of the tensors."""
    content = signed(with_configuration(saved(name)[1], saved(name)[0]))
    content = data.draw(damaged_bytes(content))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TENSORS).write_bytes(signed(content) if sign else content)
        check_folder(name, Path(folder))


@MANY
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_damaged_metadata(data, name):
    """What the header holds beside the tensors, the text of the configuration among it."""
    content = with_configuration(saved(name)[1], saved(name)[0])
    size = header_size(content)
    header = json.loads(content[8:size])
    header["__metadata__"] = data.draw(damaged_json(header["__metadata__"]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TENSORS).write_bytes(signed(safetensors_file(header, content[size:])))
        check_folder(name, Path(folder))


@MANY
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_a_damaged_header_of_the_tensors(data, name):
    config, tensors = saved(name)
    size = header_size(tensors)
    header = data.draw(damaged_json(json.loads(tensors[8:size])))
    check_load(name, config, safetensors_file(header, tensors[size:]))


@MANY
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_a_damaged_configuration(data, name):
    config, tensors = saved(name)
    check_load(name, data.draw(damaged_json(config)), tensors)


@MANY
@given(data=st.data())
def test_a_configuration_of_damaged_bytes(data):
    config, tensors = saved("mlp")
    check_load("mlp", data.draw(damaged_bytes(json.dumps(config, indent=1).encode())), tensors)


@SOME
@given(data=st.data(), variant=st.sampled_from(sorted(REGISTRY)))
def test_damaged_settings_of_each_variant(data, variant):
    config, tensors = saved("mlp", variant)
    settings = data.draw(damaged_json(config["hyperparameters"]))
    check_load("mlp", config | {"hyperparameters": settings}, tensors)


@pytest.mark.parametrize("variant", sorted(REGISTRY))
def test_every_setting_with_a_value_of_every_type(variant):
    config, tensors = saved("mlp", variant)
    for name in config["hyperparameters"]:
        for wrong in (2**62, -1, 10**9, "x", None, [], {}, 1e300, True):
            check_load("mlp", config | {"hyperparameters": config["hyperparameters"] | {name: wrong}}, tensors)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_configuration_taken_out_and_replaced(name):
    config, tensors = saved(name)
    for path in places(config):
        for wrong in ("take", *WRONG):
            found = json.loads(json.dumps(config))
            owner = functools.reduce(lambda v, key: v[key], path[:-1], found)
            if wrong == "take":
                del owner[path[-1]]
            else:
                owner[path[-1]] = wrong
            check_load(name, found, tensors)


def test_what_is_good_is_taken():
    """The checks above are not of a harness that refuses everything."""
    for name in NAMES:
        assert check_load(name, *saved(name))


class Package:
    """A compiled package as ``torch`` gives it: text, and tensors by name."""

    def __init__(self, found: SmallModel) -> None:
        self.values = {name: t.detach().clone() for name, t in found.model.state_dict().items()}
        held = contents(found.model, torch.ones(()), found.model.state_dict(keep_vars=True))
        self.text = json.dumps(held)

    def get_metadata(self) -> dict[str, str]:
        return {FORMAT: self.text}

    def get_constant_fqns(self) -> list[str]:
        return [*self.values, "coeff"]

    def load_constants(self, values: dict[str, torch.Tensor], *, check_full_update: bool) -> None:
        assert not check_full_update
        self.values |= {name: tensor.clone() for name, tensor in values.items()}


def check_swap(package: Package, config: Any, tensors: bytes) -> bool:
    before = {name: t.clone() for name, t in package.values.items()}
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder), config, tensors)
        error = outcome(lambda: swap(package, folder, coeff=0.5))
    if error is not None:
        assert package.values.keys() == before.keys()
        assert all(torch.equal(package.values[name], t) for name, t in before.items())
    return error is None


@MANY
@given(data=st.data(), kind=st.sampled_from(("configuration", "tensors", "program")))
def test_swap_with_a_damaged_adapter_or_program(data, kind):
    package, (config, tensors) = Package(operated("mlp")), saved("mlp")
    if kind == "configuration":
        config = data.draw(damaged_json(config))
    elif kind == "tensors":
        tensors = data.draw(damaged_bytes(tensors))
    else:
        package.text = json.dumps(data.draw(damaged_json(json.loads(package.text))))
    check_swap(package, config, tensors)


def test_swap_takes_what_is_good():
    assert check_swap(Package(operated("mlp")), *saved("mlp"))


def test_a_variant_with_an_endless_core_is_refused_where_it_is_made():
    for variant, name in (("antipasto_dplr", "k"),):
        with pytest.raises(VariantError):
            REGISTRY[variant](**{name: 10**12})
