"""The command line: overrides, and errors on one line with exit code 2."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from pshare_jax.config_files import load_config
from pshare_jax.train.__main__ import main
from pshare_jax.train.config import TrainConfig, with_rate
from pshare_jax.train.config_check import check_config
from tests.train.helpers import chats, write_jsonl


def errors_of(capsys, *args: str) -> str:
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pshare_jax.train: ")
    return line


GIVEN = ("--base=b", "--output=o", "--data.train=[d.jsonl]")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer.learnin_rate=1"], "learnin_rate"),
        (["--mode=half"], "mode"),
        (["--tail=0"], "tail is 0, but a decode module reads at least one prompt token"),
        (["--tail=first-message"], "tail"),
        (["--tail={invocation: [5, 6]}"], "tail: an invocation is for LoRA modules"),
        (["--optimizer.beta2=1.0"], "optimizer.beta2 is 1.0"),
        (["--optimizer.learning_rate=.nan"], "optimizer.learning_rate is nan"),
        (["--data.train=[]"], "data.train: name at least one"),
        (["--optimizer.micro_batch_size=7"], "must be a multiple of optimizer.micro_batch_size"),
        (["--mesh.data=3"], "cannot be split evenly over mesh.data x mesh.fsdp = 3"),
        (["--loss=mine"], "loss is 'mine'; write it as module:function"),
        (["--optimizer.factory=a.b"], "optimizer.factory is 'a.b'; write it as"),
        (["--mode=distill", "--distill.teacher=http://x"], "distill.model: name the model"),
        (["--lora.rank=4", "--lora.targets=[q,q]"], "lora.targets"),
        (["--mode=distill"], "distill.teacher: mode distill needs one"),
        (["--distill.teacher=x"], "the other modes have none"),
        (["--checkpoint.export=best"], "best needs data.eval"),
        (["--distributed.coordinator=localhost:1"], "process_id -1 of num_processes 0"),
        (["--mesh.data=64", "--optimizer.batch_size=64"], "64 devices, but there are 8"),
        (["--base=/nowhere"], "/nowhere: is not a checkpoint"),
    ],
)
def test_errors_name_the_key(capsys, flags, message):
    jax.devices()  # JAX has started, so that a flag cannot give this process other devices
    assert message in errors_of(capsys, *GIVEN, *flags, "--compilation_cache_dir=")


def test_a_decode_module_is_no_base(capsys, plain_run, data, tmp_path):
    module = plain_run.folder / "decode_module"
    flags = (f"--base={module}", f"--output={tmp_path / 'run'}", f"--data.train=[{data}]")
    message = errors_of(capsys, *flags, "--compilation_cache_dir=")
    assert "is a decode module; name a prefill checkpoint" in message


def test_bad_data_is_one_line(capsys, base, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}])
    flags = (f"--base={base}", f"--output={tmp_path / 'run'}", f"--data.train=[{data}]")
    assert "d.jsonl:1: this is plain text" in errors_of(capsys, *flags, "--compilation_cache_dir=")


def test_defaults_are_the_papers_and_what_the_configurations_advise():
    config = TrainConfig("base", "output")
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.999, 0.1)
    assert (optimizer.warmup, optimizer.clip_norm) == (0.03, 0)
    files = sorted((Path(__file__).parents[2] / "configs/train").glob("*.yaml"))
    assert files
    for file in files:
        shipped = load_config(TrainConfig, [f"--config={file}"], "train")
        check_config(shipped)
        assert config.data.max_length == shipped.data.max_length
        assert optimizer.epochs == shipped.optimizer.epochs
        assert optimizer.batch_size == shipped.optimizer.batch_size
        if shipped.mode != "full":
            assert config.tail == shipped.tail
        if shipped.mode != "distill":
            same = replace(config, lora=shipped.lora)
            assert with_rate(same).optimizer.learning_rate == shipped.optimizer.learning_rate


def test_examples_can_be_looked_at_before_training(capsys, base, tmp_path):
    data = write_jsonl(
        tmp_path / "d.jsonl", [{**chats(1, seed=1, turns=2)[0], "source": "web"}] * 3
    )
    held_out = write_jsonl(tmp_path / "e.jsonl", chats(1, seed=1, turns=2) + chats(1, seed=2))
    flags = [f"--base={base}", f"--output={tmp_path / 'run'}", f"--data.train=[{data}]"]
    assert main([*flags, f"--data.eval=[{held_out}]", "--tail=3", "--show", "2"]) == 0
    out, err = capsys.readouterr()
    assert not (tmp_path / "run").exists()
    messages = chats(1, seed=1, turns=2)[0]["messages"]
    first, second = (messages[i]["content"] for i in (1, 3))
    assert out.count(f"⟦{first}<|im_end|>⟧") == out.count(f"⟦{second}<|im_end|>⟧") == 2
    assert out.count("‖") == 1 + 2  # in the legend, and in the last prompt of each
    assert out.count("tokens from the base's KV, 3 read, ") == 4
    assert "d.jsonl:2: " in out
    assert "d.jsonl:3: " not in out
    assert out.count("dropped: source") == 2
    text = " ".join(err.split())
    assert "data.train: 3 examples, 6 answers" in text
    assert "source (3)" in text
    assert "data.train: 2 examples are copies of earlier ones" in text
    assert "warning: 1 of 2 questions of data.eval are in data.train too" in text
