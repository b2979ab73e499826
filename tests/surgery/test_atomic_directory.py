"""Folders under kills, full disks and several writers: what is read is the old or the new, whole, never between."""

from __future__ import annotations

import errno
import functools
import mmap
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.checkpoint.journal import resumable
from exporters.shared.export_report import Exported
from exporters.shared.publish import part_name, publish, staged
from surgery import save_adapter
from surgery.errors import AdapterError, ExportError
from surgery.storage.adapter_file import CONFIG, TENSORS, open_adapter
from surgery.storage.adapter_reader import opened_adapter
from surgery.storage.model_card import CARD
from surgery.support.atomic_directory import locked, write_directory
from surgery.support.untrusted_files import read_json
from tests.support.adapter_files import bare_tensors, configuration, write_older
from tests.support.operated_models import operated
from tests.support.processes import at_call, calls_of, in_child, kills

FILES = (TENSORS, CONFIG, CARD)
Files = dict[str, bytes]


@functools.cache
def adapters() -> tuple[Files, ...]:
    """The files of some adapters of one model, the last of another size."""
    import tempfile

    found = []
    for name, scale in (("mlp", 0.1), ("mlp", 0.2), ("mlp", 0.3), ("mlp", 0.4), ("raw", 1.0)):
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(operated(name, scale=scale).model, folder)
            found.append({file: (Path(folder) / file).read_bytes() for file in FILES})
    return tuple(found)


def read(path: Path) -> int:
    """Which adapter a folder holds, by configuration and by every tensor."""
    with opened_adapter(path) as (config, tensors):
        values = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    for i, (expected, found) in enumerate(known()):
        if config["sha256"] == expected:
            assert found.keys() == values.keys()
            assert all(torch.equal(found[name], values[name]) for name in found)
            return i
    raise AssertionError("an adapter that nobody wrote")


@functools.cache
def known() -> list[tuple[str, dict[str, torch.Tensor]]]:
    import json

    from safetensors.torch import load

    return [(json.loads(files[CONFIG])["sha256"], load(files[TENSORS])) for files in adapters()]


def contents(path: Path) -> dict[str, bytes | None]:
    """Every file and folder below a path."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in sorted(path.rglob("*"))
    }


def put(path: Path, which: int) -> None:
    write_directory(path, {name: [data] for name, data in adapters()[which].items()})


def whole(path: Path, which: int) -> bool:
    """Whether a folder holds one adapter and nothing else."""
    return contents(path) == adapters()[which]


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[], Path]:
    """Makes a folder that holds the first adapter, always the same."""
    adapters(), known()

    def make() -> Path:
        shutil.rmtree(tmp_path / "place", ignore_errors=True)
        put(tmp_path / "place" / "adapter", 0)
        return tmp_path / "place" / "adapter"

    return make


@pytest.mark.parametrize("other", [1, 4, 0])
def test_a_kill_at_any_system_call_leaves_the_old_or_the_new_adapter(other: int, adapter: Callable[[], Path]) -> None:
    path, seen, count = adapter(), [], 0
    for count in kills(lambda: put(path, other)):  # noqa: B007
        seen.append(read(path))
        put(path, 2)
        assert whole(path, 2)
        assert os.listdir(path.parent) == ["adapter"]
        adapter()
    assert count > 15
    assert seen == sorted(seen, key=lambda which: which == other)  # a single point where the one becomes the other
    assert set(seen) == {0, other}


def older(path: Path, which: int) -> None:
    """Put an adapter there as format 2 has it."""
    path.mkdir(parents=True, exist_ok=True)
    put(path, which)
    write_older(path, configuration(path), bare_tensors(path))
    (path / CARD).unlink()


def read_any(path: Path) -> int:
    """Which adapter a folder holds, in either format, by every tensor."""
    with opened_adapter(path) as (_, tensors):
        values = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return next(
        i for i, (_, found) in enumerate(known())
        if found.keys() == values.keys() and all(torch.equal(found[name], values[name]) for name in found)
    )  # fmt: skip


def test_a_kill_while_an_older_format_is_replaced(tmp_path: Path) -> None:
    adapters(), known()
    path, seen = tmp_path / "adapter", []
    older(path, 0)
    for _ in kills(lambda: put(path, 1)):
        seen.append(read_any(path))
        put(path, 2)
        assert whole(path, 2)
        shutil.rmtree(path)
        older(path, 0)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("files", [FILES, FILES[:1]])
def test_a_reader_of_an_older_format_that_is_replaced_meanwhile(
    files: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two reads, of the tensors and of the configuration beside them."""
    older(tmp_path / "adapter", 0)

    def replaced_first(file: Path) -> Any:
        write_directory(tmp_path / "adapter", {name: [adapters()[1][name]] for name in files})
        return read_json(file)

    monkeypatch.setattr("surgery.storage.adapter_file.read_json", replaced_first)
    assert read_any(tmp_path / "adapter") in ((1,) if len(files) > 1 else (0, 1))


@pytest.mark.full
def test_a_kill_of_what_follows_a_kill(adapter: Callable[[], Path], tmp_path: Path) -> None:
    path, left = adapter(), tmp_path / "left"
    for _ in kills(lambda: put(path, 1)):
        first = read(path)
        shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(path.parent, left)
        for other in (0, 1, 2):
            for _ in kills(lambda other=other: put(path, other)):
                assert read(path) in (first, other)
                put(path, 3)
                assert whole(path, 3)
                shutil.rmtree(path.parent)
                shutil.copytree(left, path.parent)
        adapter()


def test_a_kill_leaves_no_half_of_a_new_directory(tmp_path: Path) -> None:
    adapters(), known()
    path, seen = tmp_path / "parent" / "adapter", []
    for _ in kills(lambda: put(path, 1)):
        seen.append(read(path) if path.exists() else None)
        put(path, 2)
        assert whole(path, 2)
        assert os.listdir(path.parent) == ["adapter"]
        shutil.rmtree(path.parent)
    assert seen == sorted(seen, key=lambda which: which == 1)
    assert set(seen) == {None, 1}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("new", [False, True])
def test_an_error_at_any_system_call_leaves_the_old_or_the_new_adapter(
    new: bool, error: BaseException, adapter: Callable[[], Path], tmp_path: Path
) -> None:
    path = tmp_path / "parent" / "new" if new else adapter()
    total = calls_of(lambda: put(path, 1))

    def fail() -> None:
        raise error

    for number in range(total):
        if new:
            shutil.rmtree(path.parent)
        else:
            adapter()
        before, raised = contents(tmp_path), False
        try:
            with at_call(number, fail):
                put(path, 1)
        except type(error):
            raised = True
        written = path.exists() and read(path) == 1
        if raised and not written:
            assert contents(tmp_path) == before
        assert written or raised
        assert not (written and raised and isinstance(error, OSError)), "an error is reported, and all is done"
        put(path, 2)
        assert whole(path, 2)
        assert os.listdir(path.parent) == [path.name]


def limited(size: int, work: Callable[[], Any]) -> Callable[[], None]:
    """Some work that must fail because files cannot grow beyond a size."""

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(OSError, match="File too large"):
            work()

    return run


def test_a_full_disk_leaves_the_old_adapter(adapter: Callable[[], Path]) -> None:
    path = adapter()
    before, sizes = contents(path.parent), [len(data) for data in adapters()[4].values()]
    for size in (0, 1, sizes[1] - 1, sizes[0] // 2, sizes[0] - 1):
        assert in_child(limited(size, lambda: put(path, 4))) == 0
        assert contents(path.parent) == before
        assert in_child(limited(size, lambda: put(path.parent / "new" / "one", 4))) == 0
        assert contents(path.parent) == before


def test_a_file_system_without_links_or_locks(adapter: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    path = adapter()
    for _ in kills(lambda: put(path, 1)):
        assert read(path) in (0, 1)
        adapter()
    put(path, 1)
    assert whole(path, 1)


def test_foreign_files_are_replaced(adapter: Callable[[], Path]) -> None:
    for name in (TENSORS, CONFIG):
        for content in (b"", b"[]", b"\x02" + bytes(7) + b"{}", None):
            path = adapter()
            (path / name).unlink()
            if content is not None:
                (path / name).write_bytes(content)
            if name == CONFIG:  # the mirror is not read
                assert read(path) == 0
            else:
                with pytest.raises(AdapterError):
                    read(path)
            put(path, 1)
            assert whole(path, 1)


def test_only_what_a_killed_writer_left_is_removed(adapter: Callable[[], Path]) -> None:
    path = adapter()
    mine = [".adapter_model.safetensors", ".adapter.0123456789abcdef", ".adapter.0123456789abcdeg.tmp"]
    mine += ["adapter.0123456789abcdef.tmp", ".adapter.0123.tmp", ".other.0123456789abcdef.tmp"]
    for name in mine:
        (path / name).mkdir()
    left = path / ".adapter.0123456789abcdef.tmp"
    left.mkdir()
    (left / TENSORS).write_text("half of it")
    put(path, 1)
    assert sorted(os.listdir(path)) == sorted([*FILES, *mine])


@pytest.mark.parametrize("new", [False, True])
def test_four_writers_and_a_reader(new: bool, adapter: Callable[[], Path], tmp_path: Path) -> None:
    path, done = (tmp_path / "new" if new else adapter()), mmap.mmap(-1, 1)  # which the children share

    def writer(which: int) -> None:
        pauses = random.Random(which)
        while not done[0]:
            put(path, which)
            time.sleep(pauses.uniform(0, 0.02))  # who waits for a lock asks for it every 10 ms

    children = []
    for which in range(4):
        if (child := os.fork()) == 0:
            status = 1
            try:
                writer(which)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    seen: Counter[int] = Counter()
    try:
        while len(seen) < 3 or seen.total() < 100:  # however long that takes on a busy machine
            if path.exists():
                seen[read(path)] += 1
    finally:
        done[0] = 1
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert any(whole(path, which) for which in range(4))
    assert os.listdir(path.parent) == [path.name]


def test_tensors_that_are_held_stay_what_they_are(adapter: Callable[[], Path]) -> None:
    path = adapter()
    with open_adapter(path) as file:
        for number, which in enumerate((1, 2)):
            if not Path("/proc/self/fd").exists():
                with pytest.raises(AdapterError, match="was replaced"), file.opened():
                    pass
                return
            put(path, which)
            with file.opened() as tensors:
                assert all(torch.equal(tensors.get_tensor(n), t) for n, t in known()[0][1].items()), number


def test_a_second_merge_into_a_folder_is_refused(tmp_path: Path) -> None:
    with resumable(tmp_path / "out", "digest") as (files, journal):
        (files / "one").write_text("1")
        journal.finish("one")
        with (
            pytest.raises(ExportError, match="another process is merging into"),
            resumable(tmp_path / "out", "digest"),
        ):
            pass
        (files / "two").write_text("2")
    assert contents(tmp_path / "out") == {"one": b"1", "two": b"2"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_can_be_taken_again(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path, wait=False) as held:
            assert held
            with pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
                pass


def export(path: Path, text: str, *, parts: bool = False) -> None:
    """What an exporter does: a main file, perhaps with one beside it, or a folder."""
    with staged(path, "main.bin") as (written, target):
        part = part_name(written.name, text * 16)
        if parts:
            (written.parent / part).write_text(text)
        written.write_text(f"{text} {part if parts else ''}")
        publish(written, target, "test", Exported(0.0))


def loaded(path: Path) -> str:
    """What an export says, after a look at the file beside it."""
    text, _, part = path.read_text().partition(" ")
    assert not part or (path.parent / part).read_text() == text
    return text


@pytest.mark.parametrize("parts", [False, True])
def test_a_kill_of_an_export_over_another(parts: bool, tmp_path: Path) -> None:
    path, seen = tmp_path / "main.bin", []
    export(path, "a", parts=parts)
    for _ in kills(lambda: export(path, "b", parts=parts)):
        seen.append(loaded(path))
        export(path, "c", parts=parts)
        assert loaded(path) == "c"
        assert len(os.listdir(tmp_path)) == 1 + parts
        export(path, "a", parts=parts)
    assert "".join(seen) == "a" * seen.count("a") + "b" * seen.count("b")
    assert {"a", "b"} == set(seen)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_a_kill_of_an_export_into_a_folder(empty: bool, parts: bool, tmp_path: Path) -> None:
    folder, seen = tmp_path / "out", set()
    folder.mkdir()
    for _ in kills(lambda: export(folder, "a", parts=parts)):
        found = os.listdir(folder) if folder.exists() else []
        seen.add(len(found))
        if found:
            assert loaded(folder / "main.bin") == "a"
            shutil.rmtree(folder)
        export(folder, "b", parts=parts)
        assert loaded(folder / "main.bin") == "b"
        assert os.listdir(tmp_path) == ["out"]
        shutil.rmtree(folder)
        if empty:
            folder.mkdir()
    assert seen == {0, 1 + parts}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_in_an_export_leaves_the_old_or_the_new(existing: bool, error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "new" / "main.bin"

    def begin() -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        if existing:
            export(path, "a", parts=True)

    def fail() -> None:
        raise error

    begin()
    total = calls_of(lambda: export(path, "b", parts=True))
    for number in range(total):
        begin()
        before, raised = contents(tmp_path), False
        try:
            with at_call(number, fail):
                export(path, "b", parts=True)
        except (ExportError, KeyboardInterrupt):
            raised = True
        done = path.exists() and loaded(path) == "b"
        assert done or raised
        if not done:
            assert contents(tmp_path) == before
        export(path, "c", parts=True)
        assert len(os.listdir(path.parent)) == 2


def test_an_export_into_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(Path("."), "a", parts=True)
    assert loaded(Path("main.bin")) == "a"
    assert len(os.listdir(tmp_path)) == 2
    assert os.path.samefile(tmp_path, ".")
