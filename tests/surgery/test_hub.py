"""Adapters sent to and fetched from a hub: a small server of this process speaks as the Hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery import load_adapter, pull_adapter, push_adapter
from surgery.storage.adapter_file import CONFIG, TENSORS
from tests.support.saved_adapters import contents, saved
from tests.support.zoo import small_model

ROOT = Path(__file__).parents[2]
COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a table of files; ``asked`` is what requests came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing on the terminal."""

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repos.get(name)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif parts[0] == "api" and "tree" in parts:
            rows = [{"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                    for k, v in files.items()]  # fmt: skip
            self.answer(rows)
        elif parts[0] == "api":
            self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        elif (data := files.get("/".join(parts[4:]))) is not None:
            self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            self.server.repos.setdefault(name, {})
            self.answer({"url": f"{self.server.address}/{name}"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


COMMANDS = """
import contextlib, io, json, os, sys
from surgery.cli.main import main
told = []
for folder, *arguments in json.loads(sys.argv[1]):
    os.chdir(folder)
    sys.argv = ["surgery", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    told.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(told))
"""


def commands(hub: Hub, *lines: tuple[Any, ...], home: Path) -> list[tuple[int, str, str]]:
    """Run command lines, each with its working directory before it, in one process whose Hub is the server.

    Returns:
        Status, standard output and standard error of each.
    """
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_TOKEN": "t",
        "PYTHONPATH": str(ROOT),
    }
    run = [sys.executable, "-c", COMMANDS, json.dumps([[str(part) for part in line] for line in lines])]
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(told) for told in json.loads(done.stdout.splitlines()[-1])]


def test_an_adapter_goes_to_the_hub_and_comes_back(hub, tmp_path):
    found = saved(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("What it is.")
    (tmp_path / "adapter" / "optimizer.bin").write_text("mine")
    push = (ROOT, "push", tmp_path / "adapter", "me/tuned")
    [(status, out, err)] = commands(hub, push, home=tmp_path / "home")
    assert status == 0, err
    assert f"/me/tuned/commit/{COMMIT}" in out
    assert sorted(hub.repos["me/tuned"]) == ["README.md", CONFIG, TENSORS]
    hub.repos["me/tuned"] |= {"pytorch_model.bin": b"pickle", "../evil.py": b"evil"}  # are not asked for
    (tmp_path / "there").mkdir()
    pulls = (ROOT, "pull", "me/tuned", tmp_path / "new" / "pulled"), (tmp_path / "there", "pull", "me/tuned", ".")
    for status, _, err in commands(hub, *pulls, home=tmp_path / "home"):
        assert status == 0, err
    assert contents(tmp_path / "new" / "pulled").keys() == {CONFIG, TENSORS}
    assert os.listdir(tmp_path / "new") == ["pulled"]
    assert contents(tmp_path / "there") == contents(tmp_path / "new" / "pulled")
    fresh = small_model("mlp")
    load_adapter(fresh.model, tmp_path / "new" / "pulled")
    assert torch.equal(fresh.run(), found.run())
    assert not any("evil" in line or "bin" in line for line in hub.asked if "resolve" in line)


def test_what_the_hub_sends_is_checked(hub, tmp_path):
    saved(tmp_path / "adapter")
    files = contents(tmp_path / "adapter")
    hub.repos = {"me/damaged": {**files, TENSORS: files[TENSORS][:-1] + b"!"}, "me/other": {"README.md": b"nothing"}}
    wrong = {"me/damaged": "is damaged", "me/other": TENSORS, "me/none": "cannot fetch"}
    told = commands(hub, *((ROOT, "pull", name, tmp_path / name) for name in wrong), home=tmp_path / "home")
    for (name, words), (status, _, err) in zip(wrong.items(), told, strict=True):
        assert status == 1
        assert words in " ".join(err.split())
        assert "Traceback" not in err
        assert not (tmp_path / name).exists()


def test_a_damaged_adapter_is_not_sent(tmp_path):
    saved(tmp_path)
    data = (tmp_path / TENSORS).read_bytes()
    for damaged, words in ((b"nothing", "cannot read"), (data[:-1] + b"!", "is damaged")):
        (tmp_path / TENSORS).write_bytes(damaged)
        with pytest.raises(surgery.AdapterError, match=words):
            push_adapter(tmp_path, "me/tuned")


def test_without_a_network_the_reason_is_told(tmp_path):
    saved(tmp_path / "adapter")
    for run in (lambda: push_adapter(tmp_path / "adapter", "me/tuned"), lambda: pull_adapter("me/tuned")):
        with pytest.raises(surgery.AdapterError, match=r"cannot (send|fetch) .*(offline|disabled)"):
            run()
    with pytest.raises(surgery.AdapterError, match="cannot fetch 'no/such/name'"):
        pull_adapter("no/such/name", tmp_path / "new")
    with pytest.raises(surgery.AdapterError, match="revision must be a text"):
        pull_adapter("me/tuned", revision=5)  # type: ignore[arg-type]
    with pytest.raises(surgery.AdapterError, match="must be a new or empty directory"):
        pull_adapter("me/tuned", tmp_path / "adapter")
    assert not (tmp_path / "new").exists()
