"""The contenders of the speed matrix: ours in every form, the usual hooks, and the adapters of PEFT.

All that is ours computes one function: ``antipasto`` with gains away from their start, on the seven projections of
every layer. Each contender is judged by a reference in higher precision that shares no code with what is timed: for
ours, plain modules that compute ``x W_res^T + ((x Vh^T) (S + S elu(g))) U^T``; for a peer, its own eager modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.models.decoder_layer import PROJECTIONS, Naive
from passes.errors import InputError
from surgery import apply_surgery, merge, pipeline, sites, to_graph
from surgery.lowerings._cost_model import schedule_of

GAIN = 0.5  # standard deviation of the gains
BASE, HOOKS, BESIDE = "base", "residual hooks", "residual hooks compiled after the base"
LIVE = {f"live {name}": name for name in ("auto", "lowrank", "output", "pair", "dense")}
PEERS = ("LoRA", "PiSSA", "PSOFT")
FIRST = (BASE, "live auto", "live lowrank", HOOKS, "LoRA", "merged", "folded")
CONTENDERS = (*FIRST, "residual graph", "live output", "live pair", "live dense", BESIDE, "PiSSA", "PSOFT")
HIGHER = {torch.float64: torch.float64, torch.float32: torch.float64}  # any other dtype: float32


@dataclass(frozen=True)
class Contender:
    """A model to time, what is trained of it by name, and the model in higher precision that it has to agree with.

    Contenders of one family have the same reference.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter]
    family: str
    reference: Callable[[], tuple[nn.Module, dict[str, nn.Parameter]]]


class Absent(Exception):
    """A contender or a runtime that the installed packages do not have."""


class Makers:
    """Makes contenders of one base; its singular factors are found once."""

    def __init__(self, base: nn.Module, r: int, seed: int) -> None:
        self.base, self.r, self.seed = base, r, seed
        self.live = apply_surgery(
            copy.deepcopy(base), "antipasto", r=r, target_modules=list(PROJECTIONS), progress=False, seed=seed
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for site in sites(self.live).values():
                site.core.g.copy_(GAIN * torch.randn(len(site.core.g), generator=generator))
        dtype = next(base.parameters()).dtype
        self.higher = HIGHER.get(dtype, torch.float32)

    def make(self, name: str, x: Tensor, *, training: bool) -> Contender:
        """One contender, for an input like ``x``.

        Raises:
            Absent: PEFT does not have it.
        """
        if name in PEERS:
            return self._peer(name)
        model = self._ours(name, x, training=training)
        if name == BASE:
            return Contender(model, {}, BASE, self.base_reference)
        return Contender(model, cores(model), "ours", self._plain)

    def _ours(self, name: str, x: Tensor, *, training: bool) -> nn.Module:
        if name == BASE:
            return copy.deepcopy(self.base)
        if name in (HOOKS, BESIDE):
            return hooked(self.base, self.live)
        model: Any = copy.deepcopy(self.live)
        model.every_token = training
        if name in LIVE:
            for site in sites(model).values():
                site.lowering, site.schedule = LIVE[name], schedule_of(site, LIVE[name])
            return model  # type: ignore[no-any-return]
        if name == "merged":
            return merge(model)
        if name == "folded":
            return pipeline(model, x, form="residual", stop_after="fold").graph
        if name == "residual graph":
            return to_graph(model, x, form="residual")
        raise InputError(f"there is no contender {name!r} (known: {', '.join(CONTENDERS)})")

    def base_reference(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The plain base in higher precision."""
        return copy.deepcopy(self.base).to(self.higher), {}

    def _plain(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        model, trained = self.base_reference()[0], {}
        for key, site in sites(self.live).items():
            owner, _, name = key.rpartition(".")
            up = SimpleNamespace(**{n: t.to(self.higher) for n, t in site.factors.named_buffers()})
            core = SimpleNamespace(g=site.core.g.to(self.higher))
            plain = Naive(SimpleNamespace(factors=up, core=core, weight=site.weight.to(self.higher)))
            setattr(model.get_submodule(owner), name, plain)
            trained[f"{key}.g"] = plain.g
        return model, trained

    def _peer(self, name: str) -> Contender:
        model = copy.deepcopy(self.base)
        used = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(used)):  # the same each time it is made: one reference serves them all
            torch.manual_seed(self.seed)
            _inject(model, name, self.r)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():  # away from the start, where these adapters do nothing
            for p in model.parameters():
                if p.requires_grad:
                    noise = torch.randn(p.shape, generator=generator).to(p)
                    p.add_(noise, alpha=0.3 if name == "PSOFT" and p.numel() == self.r else 0.02)
        model.requires_grad_(False)
        trained = {n: p.requires_grad_() for n, p in model.named_parameters() if _is_adapter(n)}

        def reference() -> tuple[nn.Module, dict[str, nn.Parameter]]:
            copied = copy.deepcopy(model).to(self.higher)
            return copied, {n: p for n, p in copied.named_parameters() if _is_adapter(n)}

        return Contender(model, trained, name, reference)


def cores(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a model of ours, by the name of the site."""
    if not sites(model):
        return {n.replace("hooked_", ""): p for n, p in model.named_parameters() if n.endswith("hooked_g")}
    return {f"{key}.{n}": p for key, site in sites(model).items() for n, p in site.core.named_parameters()}


def hooked(base: nn.Module, live: nn.Module) -> nn.Module:
    """The residual form as it is usually run: cropped weights, and a forward hook on each module that adds the rest."""
    model = copy.deepcopy(base).requires_grad_(False)
    for key, site in sites(live).items():
        module, factors = model.get_submodule(key), site.factors
        for name in ("U", "S", "Vh"):
            module.register_buffer(f"hooked_{name}", getattr(factors, name).clone())
        module.register_parameter("hooked_g", nn.Parameter(site.core.g.detach().to(factors.S.dtype)))
        module.register_forward_hook(_rest)
        cropped = site.weight.detach().double() - (factors.U.double() * factors.S.double()) @ factors.Vh.double()
        module.weight = nn.Parameter(cropped.to(site.weight.dtype), requires_grad=False)
    return model


def _rest(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    gain = module.hooked_S * (1 + nn.functional.elu(module.hooked_g))
    return output + ((args[0] @ module.hooked_Vh.T) * gain) @ module.hooked_U.T


def _inject(model: nn.Module, name: str, r: int) -> None:
    try:
        import peft
    except ImportError as error:
        raise Absent("peft is not installed") from error
    options: dict[str, Any] = {"r": r, "target_modules": list(PROJECTIONS)}
    if name == "PSOFT":
        if not hasattr(peft, "PsoftConfig"):
            raise Absent(f"peft {peft.__version__} has no PSOFT")
        config = peft.PsoftConfig(**options, psoft_alpha=r, psoft_svd="lowrank", psoft_svd_lowrank_niter=4)
    else:
        start = "pissa_niter_4" if name == "PiSSA" else True
        config = peft.LoraConfig(**options, lora_alpha=r, init_lora_weights=start)
    peft.inject_adapter_in_model(config, model)


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "psoft_R" in name
