"""The way of a newcomer: the README's code and what it prints, the command line, the demo, recorded results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forked_commands import run_forked

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    here = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)  # not what is installed
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": here, **env}
    return subprocess.run(args, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3600, check=False)


@pytest.mark.long
def test_the_readmes_example_prints_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text("\n".join(blocks("python")))
    done = run(sys.executable, "example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [line.rstrip() for block in blocks("text") for line in block.strip().splitlines()]
    assert [line.rstrip() for line in done.stdout.strip().splitlines()] == expected
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_readmes_commands_exist() -> None:
    targets = re.findall(r"^make (\S+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


DATA = sorted((ROOT / "bench" / "results").rglob("*.json*"))


@pytest.mark.parametrize("file", DATA, ids=lambda file: file.name)
def test_results_say_where_they_come_from(file: Path) -> None:
    text = file.read_text()
    found = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]
    assert found
    for data in found:
        assert all(data[entry] for entry in ("command", "commit", "versions", "hardware", "threads"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A short run of the whole demo."""
    folder = tmp_path_factory.mktemp("demo")
    size = ["--base-steps", "12", "--steps", "6", "--batch", "4", "--length", "32", "--r", "24"]
    short = [*size, "--cache", "cache", "--out", "out"]
    return folder / "out", run(sys.executable, "-m", "surgery", "demo", *short, cwd=folder)


@pytest.mark.long
def test_a_short_demo_verifies_everything_but_learning(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = demo
    assert (out / "demo.json").is_file(), done.stdout + done.stderr
    data = json.loads((out / "demo.json").read_text())
    failed = [what for what, _, passed in data["rows"] if passed is False and not what.startswith("held-out loss")]
    assert failed == []
    names = [what for what, _, passed in data["rows"] if passed]
    graphs = ("graph: to_graph, residual form", "graph: fold", "graph: merge")
    for name in (
        "identity at insertion",
        "coeff = 0 after training",
        "undo",
        "merge error",
        *graphs,
        "ONNX Runtime, live",
    ):
        assert name in names
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (done.returncode == 0) == all(passed is not False for _, _, passed in data["rows"])


def test_the_demos_adapter_and_graphs_are_left_behind(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = demo
    for name in ("adapter/adapter_config.json", "merged.onnx", "live.onnx", "demo.md"):
        assert (out / name).stat().st_size > 0


@pytest.mark.long
def test_the_demo_on_a_model_and_a_text_of_ones_own(tmp_path: Path) -> None:
    import tokenizers
    import transformers

    characters = {chr(i): i for i in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=characters, merges=[], unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "mine.txt").write_text("a text of my own, long enough to hold some of it out; " * 1200)
    size = ["--steps", "12", "--batch", "4", "--length", "32", "--r", "16", "--lr", "0.05", "--out", "out"]
    done = run(sys.executable, "-m", "surgery", "demo", "--model", "model", "--text", "mine.txt", *size, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert list(data["held_out"]) == ["mine.txt", "Python source"]
    assert data["unit"] == "token"


@pytest.mark.long
def test_the_command_line(tmp_path: Path) -> None:
    helped = run(sys.executable, "-m", "surgery", "--help", cwd=tmp_path)
    assert helped.returncode == 0
    assert "demo" in helped.stdout
    listed = run(sys.executable, "-m", "surgery", "variants", cwd=tmp_path)
    assert "antipasto" in listed.stdout
    assert "one gain per singular direction" in listed.stdout
    assert "256 trainable at r = 256" in listed.stdout
    assert "pool='rms', suppress_only=False" in listed.stdout
    demo = [sys.executable, "-m", "surgery", "demo"]
    failed = run_forked([*demo, "--text", "missing.txt"], cwd=tmp_path)
    assert failed.returncode == 1
    assert "InputError" in failed.stderr
    assert "missing.txt" in failed.stderr
    assert "Traceback" not in failed.stderr
    (tmp_path / "short.txt").write_text("too short")
    failed = run_forked([*demo, "--model", "model", "--text", "short.txt"], cwd=tmp_path)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr


def test_importing_surgery_is_light() -> None:
    code = (
        "import sys, torch\nimport surgery\n"
        "heavy = {'torch._dynamo', 'transformers', 'onnx', 'onnxruntime', 'onnxscript', 'matplotlib', 'peft', 'rich'}\n"
        "heavy |= {'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout.strip() == "[]"
