"""The command line: what it prints, its exit codes, and what it leaves behind."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pshare_jax.convert.__main__ import main
from pshare_jax.convert.orbax import read_manifest
from tests.convert.helpers import (
    gguf_config,
    model_config,
    random_weights,
    write_gguf,
    write_hf_folder,
)
from tests.convert.test_decoder import factors_for, write_peft

CONFIG = model_config()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An imported model and what it came from; no test changes them."""
    root = tmp_path_factory.mktemp("cli")
    write_hf_folder(root / "hf", CONFIG, random_weights(CONFIG))
    write_peft(root / "peft", factors_for("q", "down"))
    assert main(["import", str(root / "hf"), str(root / "base")]) == 0
    return root


def run(capsys, *args) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_import_shows_what_was_made(root, tmp_path, capsys):
    code, out, err = run(capsys, "import", root / "hf", tmp_path / "a", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["kind"] == "prefill"
    assert rows["dtype"] == "bfloat16"
    assert rows["fingerprint"] == read_manifest(tmp_path / "a").fingerprint


def test_inspect_shows_a_decoder_and_its_certificate(root, tmp_path, capsys):
    args = ["--lora", root / "peft", "--tail", "3", "--cache-conditioned"]
    assert run(capsys, "decoder", root / "base", tmp_path / "m", *args)[0] == 0
    code, out, _ = run(capsys, "inspect", "--check", tmp_path / "m")
    assert code == 0
    base, module = read_manifest(root / "base"), read_manifest(tmp_path / "m")
    rows = {line[:13].strip(): line[13:].strip() for line in out.splitlines()}
    assert rows == {
        "folder": str(tmp_path / "m"),
        "kind": "decode",
        "architecture": "llama: 2 layers, hidden 48, MLP 64, 4 query and 2 KV heads of 16, "
        "vocabulary 416",
        "parameters": f"{2 * 4 * (48 + 4 * 16 + 64 + 48):,}",
        "bytes": f"{4 * 2 * 4 * (48 + 4 * 16 + 64 + 48):,} in 8 tensors",
        "dtype": "float32",
        "fingerprint": module.fingerprint,
        "made for base": base.fingerprint,
        "decode kind": "lora",
        "tail": "3",
        "trained on KV": "yes",
        "LoRA": "rank 4, alpha 8",
        "LoRA targets": "q, down",
    }


@pytest.mark.parametrize(
    ("rule", "stated"),
    [
        ("last-message", '{"last-message": [[1, 316, 201], [1, 86, 81, 81, 78, 201]]}'),
        ('{"invocation": [5, 6]}', '{"invocation": [5, 6]}'),
    ],
)
def test_a_module_may_have_any_split_rule(root, tmp_path, capsys, rule, stated):
    """Made, inspected, exported and made again it has the same."""
    args = ["--lora", root / "peft", "--tail", rule, "--cache-conditioned"]
    assert run(capsys, "decoder", root / "base", tmp_path / "m", *args)[0] == 0
    assert run(capsys, "export", tmp_path / "m", tmp_path / "out")[0] == 0
    again = ["--lora", tmp_path / "out"]
    code, out, _ = run(capsys, "decoder", root / "base", tmp_path / "again", *again)
    assert code == 0
    assert dict(line.split(maxsplit=1) for line in out.splitlines())["tail"] == stated
    certificate = read_manifest(tmp_path / "m").certificate
    assert certificate is not None
    assert certificate == read_manifest(tmp_path / "again").certificate
    assert certificate.tail.to_json() == json.loads(stated)


def test_an_invocation_is_for_lora(root, tmp_path, capsys):
    args = ["decoder", root / "base", tmp_path / "m", "--tail", '{"invocation": [5]}']
    code, _, err = run(capsys, *args)
    assert code == 2
    assert "tail is an invocation, which needs kind 'lora'" in err
    assert not (tmp_path / "m").exists()


def test_a_rule_that_is_none_is_a_usage_error(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        run(capsys, "decoder", root / "base", tmp_path / "m", "--tail", "first")
    assert raised.value.code == 2
    assert "'first' is not a number, last-message or a JSON object" in capsys.readouterr().err


def test_export_and_verify_go_round(root, tmp_path, capsys):
    assert run(capsys, "export", root / "base", tmp_path / "hf")[0] == 0
    code, out, _ = run(capsys, "verify", root / "base", tmp_path / "hf", "--tolerance", "0")
    assert code == 0
    assert "largest logit difference 0 (within the tolerance 0)" in out


def test_verify_fails_above_the_tolerance(root, tmp_path, capsys):
    write_hf_folder(tmp_path / "hf", CONFIG, random_weights(CONFIG, seed=3))
    (tmp_path / "prompts").write_text("hello\nthe dog\n")
    args = ["verify", root / "base", tmp_path / "hf", "--prompts", tmp_path / "prompts"]
    code, out, err = run(capsys, *args, "--tolerance", "1e-3")
    assert code == 1
    assert "above the tolerance 0.001" in out
    assert "mean KL" in out
    assert err == ""
    assert run(capsys, *args, "--tolerance", "100")[0] == 0


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["import", "{root}/nowhere", "{out}"], "nowhere"),
        (["import", "{root}/hf", "{root}/base"], "exists already"),
        (["import", "{root}/hf/config.json", "{out}"], "not a GGUF file"),
        (["decoder", "{root}/hf", "{out}"], "is not a checkpoint"),
        (["decoder", "{root}/base", "{out}", "--tail", "0"], "tail is 0"),
        (["decoder", "{root}/base", "{out}", "--lora", "{root}/hf"], "adapter_config.json"),
        (["export", "{root}", "{out}"], "is not a checkpoint"),
        (["inspect", "{root}/hf"], "is not a checkpoint"),
        (["verify", "{root}/base", "{root}/nothing"], "nothing"),
    ],
)
def test_errors_are_one_line_and_exit_code_two(root, tmp_path, capsys, args, word):
    filled = [arg.format(root=root, out=tmp_path / "out") for arg in args]
    code, out, err = run(capsys, *filled)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert word in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [[], ["import"], ["import", "a", "b", "--dtype", "int4"], ["decoder", "a"], ["x"]]
)
def test_usage_errors_exit_with_two(args, capsys):
    with pytest.raises(SystemExit) as raised:
        main(args)
    assert raised.value.code == 2


def command(*args) -> list[str]:
    return [sys.executable, "-m", "pshare_jax.convert", *map(str, args)]


def test_no_disk_space_names_file_and_tensor_and_leaves_nothing(root, tmp_path, capsys):
    """A limit on file sizes fails writes in the middle, as a full disk does."""
    dest = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code, _, err = run(capsys, "import", root / "hf", dest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert err == f"error: {dest}: tensor embed.embedding: cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def of_many_tensors(tmp_path_factory) -> Path:
    """A GGUF file that takes long to import."""
    config = gguf_config(num_layers=200)
    path = tmp_path_factory.mktemp("deep") / "m.gguf"
    write_gguf(path, config, random_weights(config))
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(of_many_tensors, tmp_path, number):
    """The signal comes while tensors are being written."""
    dest = tmp_path / "dest" / "out"
    # Tests that run in the background of a shell ignore SIGINT, and so would their children; a
    # signal that is handled here has its default action in them.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command("import", of_many_tensors, dest),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    while process.poll() is None and not list(dest.parent.glob(".out.*.part/weights/layers.*")):
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err) == ("", "interrupted; nothing was written\n")
    assert list(dest.parent.iterdir()) == []


def test_help_needs_no_jax():
    code = (
        "import sys, pshare_jax.convert.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_terminal_gets_no_progress_bar(root, tmp_path):
    """Nor anything that JAX says as it starts."""
    done = subprocess.run(
        command("decoder", root / "base", tmp_path / "m"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 11
