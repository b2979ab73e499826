"""Choose sites by PEFT's rules: suffix lists, full-match regular expressions, layer indices, rank patterns."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from functools import partial

from torch import fx, nn

from passes.analysis.linear_sites import Site, parts
from passes.capture.inspect_model import Inspection
from passes.errors import CaptureError
from surgery.errors import RankError, TargetError, WeightError
from surgery.planning.named_no_site import left_alone, why_no_site
from surgery.planning.peft_layers import name_before, wrapped_layers
from surgery.variants import Variant

Patterns = str | Sequence[str]
GROUPS = ("all-linear", "residual-writers")


def matches(pattern: Patterns, key: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole key, a list holds whole keys or their suffixes."""
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, key) is not None
        except re.error as error:
            raise TargetError(f"{pattern!r} is not a regular expression: {error}") from error
    return key in pattern or any(key.endswith(f".{suffix}") for suffix in pattern)


def _check_patterns(name: str, patterns: Patterns) -> None:
    texts = [patterns] if isinstance(patterns, str) else patterns
    listed = isinstance(texts, Sequence | Set | Mapping) and not isinstance(texts, bytes | bytearray | memoryview)
    if not listed or not all(isinstance(text, str) for text in texts):
        raise TargetError(f"{name} must be a regular expression or a list of name suffixes, found {patterns!r:.200}")


def _layers(layers: int | Sequence[int] | None) -> list[int]:
    if layers is None:
        return []
    try:
        return [operator.index(layer) for layer in (layers if isinstance(layers, Sequence | Set) else [layers])]
    except TypeError as error:
        raise TargetError(f"layers_to_transform must be an index or a list of them, found {layers!r:.200}") from error


def layer_index(key: str) -> int | None:
    """The first number that follows a name in a key, as in ``model.layers.3.mlp``."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", f".{key}")
    return int(found.group(1)) if found else None


def output_head(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """Sites of the output head: ``get_output_embeddings()``, and all outside ``model.base_model`` if that is a part."""
    paths = {id(module): path for path, module in model.named_modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {paths[id(head)]} if id(head) in paths else set()
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model and paths.get(id(base)):
        prefix = paths[id(base)] + "."
        found |= {key for key in keys if not key.startswith(prefix)}
    return found


def why_not_chosen(model: nn.Module, inspection: Inspection, chosen: Container[str]) -> dict[str, str]:
    """Why each site of a model is not among the chosen ones, by key."""
    head = output_head(model, [site.key for site in inspection.sites])
    reasons = {}
    for site in inspection.sites:
        if site.key not in chosen:
            reason = "the output head" if site.key in head else "not selected"
            reasons[site.key] = f"tied to {', '.join(site.tied)}" if site.tied else reason
    return reasons


def select_sites(
    model: nn.Module,
    inspection: Inspection,
    *,
    target_modules: Patterns | None,
    exclude_modules: Patterns | None,
    layers_to_transform: int | Sequence[int] | None,
    config: Variant,
) -> list[Site]:
    """Choose the sites to operate on.

    Raises:
        TargetError: nothing is chosen; the message shows near misses and what exists.
        CaptureError: residual writers are asked of a model that could not be captured.
    """
    target = config.default_targets if target_modules is None else target_modules
    _check_patterns("target_modules", target)
    _check_patterns("exclude_modules", "" if exclude_modules is None else exclude_modules)
    layers = _layers(layers_to_transform)
    known = {site.key: site for site in inspection.sites}
    wrapped = wrapped_layers(model)

    def asked(patterns: Patterns, key: str) -> bool:
        return matches(patterns, key) or (bool(wrapped) and matches(patterns, name_before(wrapped, key)))

    if isinstance(model, fx.GraphModule) and not list(model.parameters()):
        raise TargetError(
            "this graph has no parameters: they are among its inputs, as in a graph that torch.compile gives to a "
            "backend; capture the model with torch.export or torch._dynamo.export"
        )
    if not known:
        if quantised := _quantised(model):
            raise WeightError(
                f"{quantised} is quantised; supported are float16, bfloat16, float32 and float64 parameters"
            )
        reasons = "; ".join(sorted({f"{s.operation}: {s.reason}" for s in inspection.skipped})[:5])
        why = why_no_site(model, inspection, partial(matches, target)) if target not in GROUPS else None
        raise TargetError(
            f"{type(model).__name__} has no linear operation with a parameter{f' ({reasons})' * bool(reasons)}"
            f"{f'; {why}' * bool(why)}"
        )
    if target in GROUPS:
        head = output_head(model, known)
        chosen = [s for s in known.values() if s.key not in head and not s.tied]
        if target == "residual-writers":
            if not inspection.captured:
                why = "; ".join(inspection.notes) or "no reason given"
                raise CaptureError(f"'residual-writers' needs the graph of the model, which was not captured ({why})")
            chosen = [s for s in chosen if s.residual]
    else:
        chosen = []
        for site in known.values():  # the parts of a weight are there by their names, where the whole is not asked for
            here = [site] if asked(target, site.key) else [p for p in parts(site, model) if asked(target, p.key)]
            chosen += here
        _report_unmatched(model, target, inspection, [site.key for site in chosen], asked)
    if config.middle_layers and target_modules is None and layers_to_transform is None:
        chosen = _middle_third(chosen)
    if layers:  # as in PEFT, a site that is named in full is chosen whatever its layer
        named = () if isinstance(target, str) else target
        chosen = [s for s in chosen if s.key in named or layer_index(s.key) in layers]
    if exclude_modules:
        inside = [part.key for site in known.values() for part in parts(site, model)]
        _warn_of_nothing_excluded(exclude_modules, inspection, [*known, *inside], asked)
        chosen = [s for s in chosen if not asked(exclude_modules, s.key)]
    if not chosen:
        raise TargetError(
            f"target_modules={target!r} with exclude_modules={exclude_modules!r} and "
            f"layers_to_transform={layers_to_transform!r} leaves no site of {_some(known)}"
        )
    return chosen


def _middle_third(chosen: list[Site]) -> list[Site]:
    """Of sites in layers, those in the middle third of the layers."""
    layers = sorted({index for site in chosen if (index := layer_index(site.key)) is not None})
    third = len(layers) // 3
    middle = layers[third : len(layers) - third]
    return [site for site in chosen if layer_index(site.key) in middle] if layers else chosen


def _quantised(model: nn.Module) -> str | None:
    """The first module or parameter that looks quantised: a class of a quantisation package, an integer matrix."""
    for path, module in model.named_modules():
        if re.search(r"quanti[sz]|quanto", type(module).__module__):
            return f"module {path!r} ({type(module).__name__})"
    matrices = [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if t.dim() == 2]
    integers = ((n, t) for n, t in matrices if not t.is_floating_point() and not t.is_complex())
    return next((f"{name!r} ({tensor.dtype})" for name, tensor in integers), None)


Asked = Callable[[Patterns, str], bool]


def _report_unmatched(
    model: nn.Module, target: Patterns, inspection: Inspection, chosen: Sequence[str], asked: Asked
) -> None:
    """Raise if no pattern matches any site; warn of a pattern of a list that does not, or names more than sites."""
    known = [site.key for site in inspection.sites]
    patterns: list[Patterns] = [target] if isinstance(target, str) else [[p] for p in target]
    unmatched = [p for p in patterns if not any(asked(p, key) for key in (*known, *chosen))]
    if not patterns:
        raise TargetError("target_modules is an empty list")
    for pattern in patterns if not isinstance(target, str) else ():
        skip = left_alone(inspection, partial(asked, pattern))
        if skip is not None and pattern not in unmatched:
            warnings.warn(f"{pattern[0]!r} also names {skip.where!r}, which is no site: {skip.reason}", stacklevel=5)
    if not unmatched:
        return
    words = [p if isinstance(p, str) else p[0] for p in unmatched]
    hint = next(filter(None, (_other_form("target_modules", p, known, asked) for p in unmatched)), "")
    if not hint:
        endings = {key.rpartition(".")[2]: None for key in known} | dict.fromkeys(known)
        near = [n for word in words for n in get_close_matches(word, endings, n=3, cutoff=0.5)]
        hint = f"; did you mean {', '.join(dict.fromkeys(map(repr, near)))}?" if near else ""
    reasons = [why_no_site(model, inspection, partial(asked, pattern)) for pattern in unmatched]
    why = "".join(f"; {reason}" for reason in reasons if reason)
    message = f"no site matches {', '.join(map(repr, words))}{hint}{why}; sites are {_some(known)}"
    if len(unmatched) == len(patterns):
        raise TargetError(message)
    warnings.warn(message, stacklevel=5)


def _other_form(name: str, pattern: Patterns, keys: Sequence[str], asked: Asked) -> str:
    """What to write, where a text would match as a list, or an entry of a list as a text; else nothing."""
    if isinstance(pattern, str):
        listed = [part.strip() for part in pattern.split(",") if part.strip()]
        found = [key for key in keys if listed and asked(listed, key)]
        if not found:
            return ""
        return (
            f": a text is a regular expression for whole keys; {name}={listed} matches their ends ({_some(found, 3)})"
        )
    try:
        found = [key for key in keys if asked(pattern[0], key)]
    except TargetError:
        return ""
    if not found:
        return ""
    return f": a list holds ends of keys; the text {name}={pattern[0]!r} is a regular expression ({_some(found, 3)})"


def _warn_of_nothing_excluded(exclude: Patterns, inspection: Inspection, keys: Sequence[str], asked: Asked) -> None:
    """Warn of patterns that leave nothing out: as in PEFT, they are no error."""
    everything = [*keys, *(skip.where for skip in inspection.skipped)]
    for pattern in [exclude] if isinstance(exclude, str) else [[p] for p in exclude]:
        if not any(asked(pattern, key) for key in everything):
            word = pattern if isinstance(pattern, str) else pattern[0]
            hint = _other_form("exclude_modules", pattern, keys, asked)
            warnings.warn(f"exclude_modules leaves nothing out by {word!r}, which no site matches{hint}", stacklevel=5)


def _some(keys: Iterable[str], most: int = 12) -> str:
    """The distinct last components of keys, or the keys themselves where these are few."""
    keys = list(keys)
    names = keys if len(keys) <= most else list(dict.fromkeys(re.sub(r"\d+", "*", key) for key in keys))
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _rank_pattern_matches(pattern: str, key: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", key) is not None
    except re.error as error:
        raise TargetError(f"rank_pattern {pattern!r} is not a regular expression: {error}") from error


def site_ranks(sites: Iterable[Site], variant: Variant, rank_pattern: Mapping[str, int] | None) -> dict[str, int]:
    """The rank of each site: ``min(r, d_out, d_in)`` or what a matching rank pattern says, as the variant can use it.

    Raises:
        RankError: a pattern's rank is below 1 or above what its site allows.
        TargetError: a rank pattern matches no chosen site.
    """
    patterns: Mapping[str, int] = {} if rank_pattern is None else rank_pattern
    ranks, used = {}, set()
    if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns):
        raise RankError(f"rank_pattern must map patterns to ranks, found {rank_pattern!r:.200}")
    for site in sites:
        limit = min(site.d_out, site.d_in)
        pattern = next((p for p in patterns if _rank_pattern_matches(p, site.key)), None)
        wanted = variant.r if pattern is None else patterns[pattern]
        if pattern is not None:
            used.add(pattern)
            if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= limit:
                raise RankError(f"rank_pattern[{pattern!r}] = {wanted!r}, but site {site.key!r} allows 1 to {limit}")
        ranks[site.key] = variant.rank(min(wanted, limit))
    if unused := set(patterns) - used:
        raise TargetError(f"rank_pattern {', '.join(map(repr, sorted(unused)))} matches no chosen site")
    return ranks
