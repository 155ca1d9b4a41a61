"""Tables and plots of a study, from results that were made up."""

from __future__ import annotations

import pytest

from pshare_jax.study import plots, report
from pshare_jax.study.config import AS_SERVED, SHARES

NAIVE = "test, share 1.0"


def result(method: str, test: str, seed: int = 0, **evaluations: str) -> dict:
    named = {"test": test, **{name.replace("_", " "): text for name, text in evaluations.items()}}
    return {
        "task": "t",
        "method": method,
        "learning_rate": 1e-3,
        "examples": 1600,
        "seed": seed,
        "tail": 1,
        "training": {"steps": 100, "step_seconds": 0.6},
        "evaluations": {
            name: {"accuracy": text.count("1") / len(text), "correct": text}
            for name, text in named.items()
        },
    }


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| t |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_seeds_are_averaged_and_items_resampled():
    """Two runs that are right on the same half of the items are no more certain than one."""
    right = "1" * 50 + "0" * 50
    one = report.tables([result("full", right)])
    both = report.tables([result("full", right), result("full", right, seed=1)])
    assert "| full fine-tuning | 1,600 | 1 | 50.0 (40.0 - 60.0) | - | 1.0 | - |" in one
    assert "| full fine-tuning | 1,600 | 2 | 50.0 (40.0 - 60.0) | - | 1.0 | - |" in both


def test_the_kv_that_training_reads_has_its_own_time():
    lora = result("lora", "10")
    lora["training"]["kv_batch_seconds"] = 1.2
    assert (
        "| PrefillShare, LoRA | 1,600 | 1 | 50.0 (0.0 - 100.0) | - | 1.0 | 2.0 |"
        in report.tables([lora])
    )


def test_what_was_served_stands_beside_the_runs_that_it_is_of():
    lora = [result("lora", "1" * 8 + "0" * 2, seed) for seed in (0, 1)]
    assert "| 80.0 (50.0 - 100.0) | - |" in report.tables(lora)
    lora[0] = result("lora", "1" * 6 + "0" * 4)
    lora[0]["evaluations"][AS_SERVED] = {"accuracy": 0.5, "correct": "1" * 5 + "0" * 5}
    assert "| 50.0 (60.0 in float32; 1 of 2 seeds) | 1.0 | - |" in report.tables(lora)
    assert "| 60.0 (30.0 - 90.0) | 50.0 | 1.0 | - |" in report.tables(lora[:1])


def test_methods_are_compared_with_full_fine_tuning_by_seed_and_item():
    full = result("full", "1" * 90 + "0" * 10)
    full["evaluations"][NAIVE] = {"accuracy": 0.0, "correct": "0" * 100}
    lora = result("lora", "1" * 92 + "0" * 8)
    other_seed = result("prefillshare", "1" * 100, seed=1)
    [naive, compared, pooled] = rows(report.tables([full, lora, other_seed]))
    assert naive[:3] == ["t", "1,600 examples", "naive sharing"]
    assert naive[5] == "-90.0 (-95.0 - -84.0)"
    assert float(naive[6]) == pytest.approx(2 * 0.5**90, rel=0.1)
    assert compared[2:5] == ["PrefillShare, LoRA", "1,600", "0"]
    # Two items differ, both in favour of LoRA.
    assert compared[5].startswith("+2.0 (+0.0")
    assert compared[6] == "0.5"
    assert pooled[1:4] == ["PrefillShare, LoRA", "1,600", "1"]
    assert pooled[5] == "yes"


def test_not_inferior_is_a_statement_on_all_seeds():
    """The whole interval above the margin; or below it; or nothing is shown."""
    full = "1" * 90 + "0" * 10
    seeds = [result("full", full, seed) for seed in (0, 1)]
    same = [result("lora", full, seed) for seed in (0, 1)]
    worse = [result("prefillshare", "1" * 60 + "0" * 40, seed) for seed in (0, 1)]
    unsure = [result("alora", "1" * 89 + "0" * 11, 0)]
    text = report.tables([*seeds, *same, *worse, *unsure], margin=0.02)
    assert "| t | PrefillShare, LoRA | 1,600 | 2 | +0.0 (+0.0 - +0.0) | yes |" in text
    assert "| t | PrefillShare, all weights | 1,600 | 2 | -30.0 (" in text
    [row] = [line for line in text.splitlines() if line.startswith("| t | PrefillShare, all")]
    assert row.endswith("| no |")
    [row] = [line for line in text.splitlines() if line.startswith("| t | activated LoRA")]
    assert row.endswith("| open |")
    # With a wider margin the same results say more.
    wide = report.tables([*seeds, *unsure], margin=0.1)
    [row] = [line for line in wide.splitlines() if line.startswith("| t | activated LoRA")]
    assert row.endswith("| yes |")


def test_layers_are_chosen_on_the_validation_set():
    layers = {
        "validation, layers 0-2": "1100",
        "test, layers 0-2": "1000",
        "validation, layers 2-4": "1000",
        "test, layers 2-4": "1111",
        "validation, layers 0-3": "1000",
        "test, layers 0-3": "1110",
    }
    full = result("full", "1111")
    for name, text in layers.items():
        full["evaluations"][name] = {"accuracy": text.count("1") / 4, "correct": text}
    text = report.tables([full])
    assert "| layers 0-2 computed anew (those weights) | 1,600 | 1 | 25.0" in text
    assert "| layers 0-3 computed anew (those weights) | 1,600 | 1 | 75.0" in text
    assert "layers 2-4" not in text


def test_accuracy_is_plotted_against_the_prefill_that_is_saved(tmp_path):
    old, new = result("lora", "10"), result("prefillshare", "11")
    assert plots._saved(old, "test", [old]) is None
    new["evaluations"]["test"] |= {"saved": 0.75, "prompt_tokens": 80}
    assert plots._saved(new, "test", [old, new]) == 0.75
    old["tail"] = 10
    assert plots._saved(old, "test", [old, new]) == pytest.approx(0.75)
    full = result("full", "11")
    full["evaluations"][NAIVE] = {"accuracy": 0.0, "correct": "00"}
    assert plots._saved(full, "test", [full]) == 0
    assert plots._saved(full, NAIVE, [full]) == 1
    assert plots.plot_saved([full, old, new], "t", tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes().startswith(b"\x89PNG")
    assert not plots.plot_saved([result("base", "00")], "t", tmp_path / "none.png")


def test_only_runs_with_all_shares_are_plotted(tmp_path):
    full = result("full", "10")
    full["evaluations"][NAIVE] = full["evaluations"]["test"]
    assert not plots.plot_shares([full], "t", tmp_path / "plot.png")
    for share in SHARES:
        full["evaluations"][f"test, share {share}"] = full["evaluations"]["test"]
    assert plots.plot_shares([full], "t", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
