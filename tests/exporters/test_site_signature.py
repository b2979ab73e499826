"""One signature of a site under swap, program metadata and ONNX cores; what an older version wrote still fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exporters import swap
from exporters.onnx.cores import core_slots
from exporters.program.metadata import FORMAT, read_metadata
from exporters.shared.site_signature import SiteSignature, TensorSignature, digest
from surgery import AdapterError, apply_surgery, sites
from tests.support.zoo import small_model

OLD = Path(__file__).parents[1] / "data" / "program_1"  # of a program and of an adapter, written before signatures


class OldPackage:
    """A loaded package as torch gives it, with the metadata that an older version wrote."""

    def __init__(self) -> None:
        self.held = json.loads((OLD / "metadata.json").read_text())
        self.values: dict[str, torch.Tensor] = {}

    def get_metadata(self) -> dict[str, str]:
        return {FORMAT: json.dumps(self.held)}

    def get_constant_fqns(self) -> list[str]:
        parts = [entry[part] for entry in self.held["sites"].values() for part in ("core", "factors")]
        return ["coeff", *(name for part in parts for tensor in part.values() for name in tensor["names"])]

    def load_constants(self, values: dict[str, torch.Tensor], *, check_full_update: bool) -> None:
        assert not check_full_update
        self.values |= values


def test_an_older_adapter_goes_into_an_older_program() -> None:
    program = OldPackage()
    swap(program, OLD / "adapter", coeff=0.5)
    stored = load_file(OLD / "adapter" / "adapter_model.safetensors")
    cores = {name: tensor for name, tensor in stored.items() if ".core." in name}
    assert len(cores) == 3
    assert program.values.keys() == {"coeff", *cores}  # and no factors, which are the same
    assert all(torch.equal(program.values[name], tensor) for name, tensor in cores.items())
    assert program.values["coeff"].item() == 0.5
    assert program.values["coeff"].dtype == torch.float32


def test_an_older_program_refuses_what_is_not_its_own() -> None:
    program = OldPackage()
    program.held["sites"]["2"]["fingerprint"] = "sha256:0"
    with pytest.raises(AdapterError, match="site '2': the adapter was made for another base weight"):
        swap(program, OLD / "adapter")
    assert program.values == {}


def test_the_names_of_older_onnx_cores_are_the_same() -> None:
    found = read_metadata(OldPackage()).sites
    signatures = {key: dataclasses.replace(site.signature, layout="out_in") for key, site in found.items()}
    names = json.loads((OLD / "cores.json").read_text())
    assert names == sorted(f"{key}.core.g@{digest(signatures)}" for key in signatures)


def test_the_digest_changes_with_all_that_gives_a_core_its_meaning() -> None:
    p = small_model("mlp")
    apply_surgery(p.model, "antipasto", r=3, example_inputs=p.inputs, progress=False)
    site = SiteSignature.of(sites(p.model)["0"])
    one = digest({"0": site})
    core = {"g": TensorSignature((4,), "float32")}
    factors = {**site.factors, "S": TensorSignature((3,), "float32", "sha256:0")}
    settings = {**site.hyperparameters, "suppress_only": True}
    others = [
        {"1": site},
        *(
            {"0": dataclasses.replace(site, **change)}
            for change in (
                {"variant": "lora_xs"}, {"fingerprint": "sha256:0"}, {"layout": "in_out"}, {"core": core},
                {"factors": factors}, {"hyperparameters": settings},
            )
        ),
    ]  # fmt: skip
    digests = [digest(other) for other in others]
    assert len({one, *digests}) == len(others) + 1
    assert next(iter(core_slots(p.model))).rpartition("@")[2] == digest(
        {key: SiteSignature.of(one) for key, one in sites(p.model).items()}
    )


def test_differences_are_named_in_order() -> None:
    p = small_model("mlp")
    apply_surgery(p.model, "antipasto", r=3, example_inputs=p.inputs, progress=False)
    site = SiteSignature.of(sites(p.model)["0"])
    assert site.difference(site) is None
    for change, what in (
        ({"fingerprint": "sha256:0"}, "another base weight"),
        ({"variant": "lora_xs"}, "variant is 'antipasto', the program has 'lora_xs'"),
        ({"r": 4}, "r is 3, the program has 4"),
        ({"hyperparameters": {**site.hyperparameters, "pool": "x"}}, "pool is 'rms', the program has 'x' in its code"),
        ({"core": {}}, r"core has ['g'], expected []"),
    ):
        assert what in str(site.difference(dataclasses.replace(site, **change)))
