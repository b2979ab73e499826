"""Read an adapter directory and check all of it against a model, before anything is touched."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from passes.analysis.linear_sites import Site, part_of
from passes.capture.inspect_model import graph_products
from passes.errors import SurgeryError
from passes.ir.parameter_names import original_names
from surgery.errors import AdapterError
from surgery.hosting.checks import check_plain
from surgery.hosting.graph_surgery import original_graph
from surgery.hosting.hosts import Graft, is_module_host, operated_sites
from surgery.modules.adapter import SSpaceLinear
from surgery.modules.graph_host_module import SSpaceNode
from surgery.storage.format_migration import migrate
from surgery.storage.site_entry import check_entry, check_key, overlap, read_parts, rows_of, variant_of
from surgery.storage.tensor_file import CONFIG, TENSORS, settled
from surgery.support.progress_bar import track
from surgery.support.untrusted_files import read_json
from surgery.variants import Variant, resolve_variant

FORMAT = "sspace-adapter"
STORED = ("exact", "recompute")


def read_adapter(model: nn.Module, path: Path, *, progress: bool = False) -> tuple[list[Graft], dict[str, Any]]:
    """Read an adapter into grafts that fit the model.

    Args:
        progress: show a progress bar where factors are made anew.

    Returns:
        The grafts, and what is noted of each site's factorisation.

    Raises:
        AdapterError: the directory is missing, damaged, or of another base model.
    """
    present = operated_sites(model)
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    paths = module_paths(model)
    for site in present.values():  # a hosted weight is named as it was before surgery
        parameters[parameter_names(paths, site)[0]] = site.parameter
    products: Collection[str] = ()
    flat = {original: name for name, original in original_names(model).items()}
    if isinstance(model, fx.GraphModule):
        products = graph_products(model, original_graph(model))[0]
    with opened_adapter(path) as (config, tensors):
        default = variant_of(config)
        expected: set[str] = set()
        grafts: list[Graft] = []
        of_weight: dict[str, list[Site]] = {}
        progress &= config["factors"] == "recompute"
        for key, entry in track(list(config["sites"].items()), "factorising", enabled=progress):
            if isinstance(entry, dict):  # a Dynamo graph has flat names
                entry = entry | {name: flat.get(str(entry.get(name)), entry.get(name)) for name in ("weight", "bias")}
            stored = config["factors"]
            graft, names = _read_site(model, path, key, entry, default, products, parameters, tensors, stored)
            others = of_weight.setdefault(graft.site.weight, [])
            if any(overlap(graft.site, other) for other in others):
                raise AdapterError(f"{str(path)!r}: site {key!r} has the weight {graft.site.weight!r} of another site")
            grafts.append(graft)
            others.append(graft.site)
            expected |= names
        if extra := sorted(set(tensors.keys()) - expected):
            raise AdapterError(f"{str(path)!r}: unexpected tensor {extra[0]!r} ({len(extra)} such)")
    return grafts, {key: {"seed": entry["seed"]} for key, entry in config["sites"].items()}


@contextlib.contextmanager
def opened_adapter(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """Open an adapter directory without a model: its configuration, and its tensors by name.

    Raises:
        AdapterError: the directory is missing or damaged.
    """
    with settled(path, read_config) as (config, file), file.opened() as tensors:
        yield config, tensors


def module_paths(model: nn.Module) -> dict[int, str]:
    """The path of every module by its identity."""
    return {id(module): path for path, module in model.named_modules()}


def parameter_names(paths: Mapping[int, str], site: SSpaceLinear) -> tuple[str, str | None]:
    """Names that the weight and bias of a site have, or had before surgery, in the model of these paths."""
    if isinstance(site, SSpaceNode):
        return site.weight_name, site.bias_name
    host: nn.Module = getattr(site, "owner", (site,))[0]
    path = paths[id(host)]
    weight = getattr(site, "weight_name", "weight")
    bias = getattr(site, "bias_name", "bias" if site.bias is not None else None)
    join = (lambda name: f"{path}.{name}") if path else (lambda name: name)
    return join(weight), join(bias) if bias else None


def read_config(path: Path) -> dict[str, Any]:
    """Read and check the configuration of an adapter.

    Raises:
        AdapterError: it is missing, damaged, or of another format.
    """
    if not path.is_dir():
        raise AdapterError(f"{str(path)!r} is not a directory; expected an adapter with {CONFIG} and {TENSORS}")
    file = path / CONFIG
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {str(file)!r}: {type(error).__name__}: {error}") from error
    if isinstance(config, dict) and "peft_type" in config:
        raise AdapterError(
            f"{str(path)!r} is a PEFT adapter; load it with peft. load_adapter reads its own format only"
        )
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise AdapterError(f"{str(file)!r} is no {FORMAT} configuration")
    config = migrate(repr(str(file)), config)
    kinds = {"variant": str, "hyperparameters": dict, "sites": dict, "tensors_sha256": str}
    for name, kind in kinds.items():
        if not isinstance(config.get(name), kind):
            raise AdapterError(f"{str(file)!r}: {name!r} must be a {kind.__name__}, found {config.get(name)!r:.80}")
    if not config["sites"]:
        raise AdapterError(f"{str(file)!r} names no site")
    if config.get("factors") not in STORED:
        raise AdapterError(
            f"{str(file)!r}: factors must be 'exact' or 'recompute', found {config.get('factors')!r:.80}"
        )
    resolve_known(config["variant"])
    for key, entry in config["sites"].items():
        check_key(f"{str(file)!r}: site {key!r}", key, entry)
    return config


def resolve_known(name: str) -> None:
    """Refuse an adapter of an unknown variant.

    Raises:
        AdapterError: with the known ones.
    """
    try:
        resolve_variant(name)
    except SurgeryError as error:
        raise AdapterError(f"cannot load the adapter: {error}") from error


def _read_site(
    model: nn.Module,
    path: Path,
    key: str,
    entry: Any,
    default: Variant,
    products: Collection[str],
    parameters: dict[str, torch.Tensor],
    tensors: Any,
    stored: str,
) -> tuple[Graft, set[str]]:
    where = f"{str(path)!r}: site {key!r}"
    check_entry(where, entry, parameters)
    host = "graph" if key in products else entry["host"]
    owner = model.get_submodule(entry["weight"].rpartition(".")[0])
    base = getattr(owner, "base_class", type(owner))
    if host == "module" and "forward" in vars(owner):  # accelerate's hooks call the forward that was there
        host = "weight"
    if host == "module" and not is_module_host(base, entry["layout"]):
        raise AdapterError(f"{where}: {base.__name__} is no linear module of layout {entry['layout']!r}")
    check_plain(key, parameters[entry["weight"]])
    rows = rows_of(where, entry, parameters[entry["weight"]])
    weight = part_of(parameters[entry["weight"]], rows)
    variant, factors, core, names = read_parts(where, key, entry, default, weight, tensors, host=host, stored=stored)
    *lead, d_out, d_in = factors.shape
    stack = lead[0] if lead else None
    site = Site(key, entry["weight"], entry.get("bias"), entry["layout"], d_out, d_in, stack=stack, rows=rows)
    return Graft(site, host, variant, factors, core), names
