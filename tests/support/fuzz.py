"""What the fuzz tests share: damage to bytes and to JSON, junk arguments, and bounds on time and memory."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from passes.errors import SurgeryError
from surgery.storage.adapter_file import TENSORS
from tests.support.adapter_files import signed, with_configuration, write_older

FULL = settings().max_examples > 100
MANY = settings(max_examples=2500 if FULL else 40)
PATIENCE = 10
SOME = settings(max_examples=600 if FULL else 20)


@contextlib.contextmanager
def bounded(seconds: float = 20.0, memory: int | None = None) -> Iterator[None]:
    """Interrupt what takes too long, where a call takes some ms; refuse memory beyond so many bytes more than now.

    Args:
        seconds: of the processor; by the clock ``PATIENCE`` times as many, since other processes may need it too.
    """

    def stop(*_: Any) -> None:
        raise AssertionError(f"not done after {seconds:g} s")

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, stop) if main else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    start = time.process_time()
    if main:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    try:
        yield
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < seconds, f"not done after {seconds:g} s"


def printable(error: BaseException) -> bool:
    """Whether a terminal may be given an error's text, and is not flooded with it."""
    text = str(error)
    return 0 < len(text) < 5000 and all(c.isprintable() or c == "\n" for c in text)


def outcome(call: Callable[[], Any], *, seconds: float = 20.0, memory: int | None = None) -> SurgeryError | None:
    """The typed error that a call raises, or None; anything else it raises goes through."""
    found = None
    with bounded(seconds, memory):
        try:
            call()
        except SurgeryError as error:
            found = error
    assert found is None or printable(found), repr(str(found))
    return found


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with up to three injuries: cut short, bits flipped, bytes put in, taken out, doubled or overwritten."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, max(len(found) - 1, 0)))
        n = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(("cut", "flip", "insert", "remove", "double", "numbers")))
        if kind == "cut":
            del found[i:]
        elif kind == "flip" and found:
            found[i] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            found[i:i] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "remove":
            del found[i : i + n]
        elif kind == "double":
            found[i:i] = found[i : i + n]
        else:
            found[i : i + 8] = draw(st.sampled_from((2**64 - 1, 2**63 - 1, 2**60, 2**31, 0))).to_bytes(8, "little")
    return bytes(found)


ESCAPE = "\x1b]0;title\x07\x1b[31m\u202eevil\r\n\x00"
WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**70, -(2**70), 10**400, 0.5, -1.5, 1e308, "", "x", "x" * 100_000,
    "../../x", "/etc/passwd", "a.b.c", "\ud800", ESCAPE, "__proto__", "__class__", "0.weight", "float32", "(a+)+$", [],
    [[]], [None], [2**31, 2**31], [0, 2**63], [-1, -1], [1.5, 2], ["x"], {}, {"": 0}, {"__proto__": {"x": 1}},
    {"a": [{}]}, [[[[[[[[]]]]]]]],
]  # fmt: skip
"""Values of each type that JSON has, among them sizes, names and numbers that tempt a reader."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within a JSON value, but itself."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return [p for key, v in inner for p in [(*path, key), *places(v, (*path, key))]]
    return []


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which up to three values are taken out, replaced, renamed, or have a neighbour put in."""
    found = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        there = places(found)
        if not there:
            return copy.deepcopy(draw(st.sampled_from(WRONG)))
        *lead, key = draw(st.sampled_from(there))
        owner = found
        for name in lead:
            owner = owner[name]
        kind = draw(st.sampled_from(("take", "replace", "replace", "rename", "add")))
        wrong = draw(st.sampled_from(WRONG) | st.integers() | st.text(max_size=8))
        if kind == "take":
            del owner[key]
        elif kind == "replace" or isinstance(owner, list):
            owner[key] = copy.deepcopy(wrong)  # which may be damaged next
        elif kind == "rename":
            owner[str(wrong)[:1000]] = owner.pop(key)
        else:
            owner[str(wrong)[:1000]] = copy.deepcopy(owner[key])
    return found


def written(folder: Path, config: Any, tensors: bytes, *, sign: bool = True, older: bool = False) -> Path:
    """An adapter folder of this configuration and these tensors, whose digest fits if signed; in format 2 if older."""
    if older:
        return write_older(folder, config, tensors, sign=sign)
    data = with_configuration(tensors, config)
    (folder / TENSORS).write_bytes(signed(data) if sign else data)
    return folder


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    """A file of that format with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def junk() -> list[Any]:
    """Arguments of every kind, made anew each time, since some can be read only once."""
    return [
        None, True, False, 0, -1, 2**70, -(2**70), 10**400, 0.5, float("nan"), float("inf"), 1e308, 1 + 2j, "", "x",
        "\0", "\ud800", "a" * 5000, "(", "[", "../../x", ESCAPE, b"", b"x", bytearray(b"x"), [], [[]], [None],
        [1, [2]], ["\0"], (), {}, {"a": 1}, {1: 2}, set(), {1}, object(), int, len, Exception, slice(3), ..., range(3),
        iter([]), torch.tensor(1.0), torch.ones(2), torch.ones(0), torch.ones(2, 2), torch.tensor([True]),
        torch.tensor(float("nan")), torch.ones(2, dtype=torch.complex64), torch.empty(3, device="meta"),
        np.array([1, 2]), np.array([]), np.float32(1), np.int64(3), nn.Linear(2, 2), nn.Linear,
    ]  # fmt: skip
