"""What the source may not hold, and what an import may not do: no pickle, no code from text, no network.

Ruff refuses most of it (``[tool.ruff.lint]`` in pyproject.toml); what it cannot tell is read off the syntax here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("passes", "surgery", "exporters", "bench")
CODE = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NETWORK = {
    "socket", "ssl", "urllib", "urllib3", "requests", "http", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib",
    "xmlrpc", "socketserver", "huggingface_hub",
}  # fmt: skip
LAZY = {
    ("surgery/storage/hub.py", "huggingface_hub"),
    ("surgery/storage/model_card.py", "huggingface_hub"),
}  # within a function only


def faults(source: str, name: str = "x.py") -> list[str]:
    """What a file of this library may not hold."""
    tree = ast.parse(source)
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        elif isinstance(node, ast.Call):
            found += _of_call(node)
            if (
                ast.unparse(node.func).endswith("import_module")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                modules = [str(node.args[0].value)]
        for module in modules:
            top = module.partition(".")[0]
            if top in PICKLES or (top in NETWORK and not ((name, top) in LAZY and id(node) in inner)):
                found.append(f"{name}:{node.lineno}: import of {module}")
    return found


def _of_call(call: ast.Call) -> list[str]:
    called, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    found = []
    if called in CODE:
        found.append(f"{call.lineno}: {called}")
    if called == "torch.load" and options.get("weights_only") != "True":
        found.append(f"{call.lineno}: torch.load without weights_only=True")
    if options.get("trust_remote_code", "False") != "False":
        found.append(f"{call.lineno}: trust_remote_code")
    if options.get("weights_only", "True") != "True" or options.get("allow_pickle", "False") != "False":
        found.append(f"{call.lineno}: a pickle is allowed")
    if options.get("shell", "False") != "False" or called in ("os.system", "os.popen"):
        found.append(f"{call.lineno}: a shell")
    return found


FILES = sorted(path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def test_no_file_holds_what_none_may_hold():
    assert len(FILES) > 100
    assert [fault for name in FILES for fault in faults((ROOT / name).read_text(), name)] == []


BAD = [
    "eval('1')", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "import pickle", "import pickle as p",
    "from marshal import loads", "import dill.source", "def f():\n    import shelve", "torch.load(path)",
    "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "f(trust_remote_code=True)",
    "f(trust_remote_code=flag)", "np.load(path, allow_pickle=True)", "subprocess.run(c, shell=True)", "os.system('ls')",
    "import socket", "from urllib import request", "import urllib.request", "def f():\n    import requests",
    "import http.client", "import huggingface_hub", "importlib.import_module('socket')",
]  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_a_bad_sample_is_found(source):
    assert faults(source)


def test_good_samples_are_not_found():
    good = "torch.load(path, weights_only=True)\nf(trust_remote_code=False)\nre.compile('x')\nmodel.eval()\nimport json"
    assert faults(good) == []
    lazy = "def f():\n    from huggingface_hub import snapshot_download"
    assert faults(lazy, "surgery/storage/hub.py") == []
    assert faults(lazy, "surgery/verbs/save_load.py")
    assert faults("import huggingface_hub", "surgery/storage/hub.py")


def test_weights_are_asked_for_as_safetensors_and_without_their_code():
    """Every ``from_pretrained`` of the product that gives a model names ``use_safetensors``."""
    for name in (name for name in FILES if not name.startswith("bench/")):
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                options = {k.arg for k in node.keywords}
                bare = ast.unparse(node.func) in (
                    "transformers.AutoConfig.from_pretrained",  # reads no weights
                    "peft.PeftModel.from_pretrained",  # of the folder that the export has just written
                )
                assert bare or "use_safetensors" in options, (name, node.lineno)


def test_ruff_refuses_the_rest():
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert {"S102", "S301", "S302", "S307", "S310", "S602", "S604", "S605", "TID251"} <= set(rules["select"])


IMPORT = """
import socket, sys
import torch, torch._dynamo, transformers, typer, rich, safetensors  # what these do is not ours
opened = []
class Blocked(socket.socket):
    def connect(self, address):
        opened.append(address)
        raise OSError("blocked")
    connect_ex = connect
def refuse(*a, **k):
    opened.append(a)
    raise OSError("blocked")
socket.socket, socket.create_connection, socket.getaddrinfo = Blocked, refuse, refuse
import pickle
def unpickled(*a, **k):
    raise AssertionError("a pickle is read")
pickle.load = pickle.loads = torch.load = unpickled
import passes, surgery, exporters, surgery.cli.main, exporters.cli
from torch import nn
import tempfile
model = nn.Sequential(nn.Linear(4, 4))
surgery.apply_surgery(model, "antipasto", r=2, progress=False)
with tempfile.TemporaryDirectory() as folder:
    surgery.save_adapter(model, folder)
    surgery.load_adapter(model, folder)
assert "huggingface_hub" not in vars(surgery)
print("connections", len(opened))
"""


def test_an_import_opens_no_connection_and_reads_no_pickle():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "connections 0"
