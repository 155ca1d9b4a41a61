"""Tables and plots of a study, from results that were made up."""

from __future__ import annotations

import pytest

from pshare_jax.study import plots, report, rows
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


def cells(text: str, name: str) -> list[str]:
    """The cells behind the name of the one line of that name."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_seeds_are_averaged_and_runs_that_answer_alike_count_as_one():
    """Two runs that are right on the same half of the items are no more certain than one."""
    right = "1" * 50 + "0" * 50
    one = report.tables([result("full", right)])
    both = report.tables([result("full", right), result("full", right, seed=1)])
    expected = ["0", "50.0 (40.4 to 59.6)", "-", "-", "-", "-"]
    assert cells(one, "full fine-tuning") == ["1,600", "1", *expected]
    assert cells(both, "full fine-tuning") == ["1,600", "2", *expected]


def test_an_accuracy_of_all_items_has_an_interval():
    assert cells(report.tables([result("full", "1" * 300)]), "full fine-tuning")[3] == (
        "100.0 (98.7 to 100.0)"
    )


def test_what_was_served_stands_beside_the_runs_that_it_is_of():
    lora = [result("lora", "1" * 8 + "0" * 2, seed) for seed in (0, 1)]
    name = "PrefillShare, LoRA, tail 1"
    assert cells(report.tables(lora), name)[4] == "-"
    lora[0] = result("lora", "1" * 6 + "0" * 4)
    lora[0]["evaluations"][AS_SERVED] = {"accuracy": 0.5, "correct": "1" * 5 + "0" * 5}
    assert cells(report.tables(lora), name)[4] == "50.0 (60.0 in float32; 1 of 2 seeds)"
    assert cells(report.tables(lora[:1]), name)[4] == "50.0"


def test_methods_are_compared_with_full_fine_tuning_by_seed_and_item():
    full = result("full", "1" * 90 + "0" * 10)
    full["evaluations"][NAIVE] = {"accuracy": 0.0, "correct": "0" * 100}
    lora = result("lora", "1" * 92 + "0" * 8)
    other_seed = result("prefillshare", "1" * 100, seed=1)
    text = report.tables([full, lora, other_seed])
    _, _, shared, _, _, difference, p, verdict = cells(text, "naive sharing (full fine-tuning)")
    assert (shared, difference, verdict) == ("100", "-90.0 (-95.0 to -84.0)", "no")
    assert float(p) == pytest.approx(2 * 0.5**90, rel=0.1)
    _, _, _, _, _, difference, p, verdict = cells(text, "PrefillShare, LoRA, tail 1")
    # Two items differ, both in favour of LoRA.
    assert difference.startswith("+2.0 (+0.0 to ")
    assert (p, verdict) == ("0.5", "yes")
    assert cells(text, "PrefillShare, all weights, tail 1")[5:] == ["-", "-", "-"]


def test_not_inferior_is_a_statement_on_all_seeds():
    """The whole interval above the margin; or below it; or nothing is shown."""
    full = "1" * 90 + "0" * 10
    seeds = [result("full", full, seed) for seed in (0, 1)]
    same = [result("lora", full, seed) for seed in (0, 1)]
    worse = [result("prefillshare", "1" * 60 + "0" * 40, seed) for seed in (0, 1)]
    unsure = [result("alora", "1" * 89 + "0" * 11, 0)]
    text = report.tables([*seeds, *same, *worse, *unsure], margin=0.02)
    alike = ["+0.0 (+0.0 to +0.0)", "1", "yes"]
    assert cells(text, "PrefillShare, LoRA, tail 1")[5:] == alike
    difference, _, verdict = cells(text, "PrefillShare, all weights, tail 1")[5:]
    assert (difference[:7], verdict) == ("-30.0 (", "no")
    assert cells(text, "activated LoRA")[-1] == "open"
    # With a wider margin the same results say more; without one, nothing.
    wide = report.tables([*seeds, *unsure], margin=0.1)
    assert cells(wide, "activated LoRA")[-1] == "yes"
    none = report.tables([*seeds, *unsure], margin=0)
    assert cells(none, "activated LoRA")[-1] == "1"
    assert "not inferior" not in none


def test_differences_are_of_the_seeds_that_both_have():
    full = result("full", "1" * 90 + "0" * 10)
    lora = [result("lora", "1" * 90 + "0" * 10, seed) for seed in (0, 1)]
    lora[1] = result("lora", "0" * 100, seed=1)
    found = cells(report.tables([full, *lora]), "PrefillShare, LoRA, tail 1")
    assert found[1] == "2"
    assert found[5] == "+0.0 (+0.0 to +0.0); 1 of 2 seeds"


def test_more_data_than_full_fine_tuning_had_gets_no_verdict():
    full, lora, less = result("full", "1" * 10), result("lora", "1" * 10), result("lora", "1" * 10)
    lora["examples"], less["examples"] = 3200, 800
    text = report.tables([full, lora, less])
    lines = [line for line in text.splitlines() if line.startswith("| PrefillShare, LoRA")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[1] for line in found] == ["800", "3,200"]
    assert found[0][6:] == ["-", "-", "-"]
    assert found[1][6:] == ["+0.0 (+0.0 to +0.0); of 1,600", "1", "-"]


def test_without_full_fine_tuning_the_ordinary_lora_is_compared_with():
    ordinary, lora = result("ordinary-lora", "1" * 10), result("lora", "1" * 5 + "0" * 5)
    text = report.tables([ordinary, lora])
    assert "| against LoRA with KV of its own, points (95 % interval) |" in text
    assert cells(text, "PrefillShare, LoRA, tail 1")[5].startswith("-50.0 (")


def test_several_tasks_stand_side_by_side_with_as_much_data():
    full = [result("full", "1" * 9 + "0", seed) for seed in (0, 1)]
    other = {**result("full", "1" * 8 + "0" * 2), "task": "u"}
    more = result("lora", "1" * 10)
    more["examples"] = 3200
    same = result("lora", "1" * 7 + "0" * 3)
    same["evaluations"]["test"]["saved"] = 0.75
    base = {"task": "u", "method": "base", "evaluations": result("x", "0" * 10)["evaluations"]}
    glance = report.glance([*full, more, same, other, base])
    assert "| | t | u |" in glance
    assert cells(glance, "full fine-tuning") == ["90.0 (0 %; 2 seeds)", "80.0 (0 %)"]
    assert cells(glance, "PrefillShare, LoRA, tail 1") == ["70.0 (75 %)", ""]
    assert cells(glance, "base, not trained") == ["", "0.0"]
    assert report.glance(full) == ""


def test_runs_of_several_learning_rates_are_not_averaged():
    fast = {**result("lora", "1111"), "learning_rate": 0.01}
    slow = {**result("lora", "0000"), "learning_rate": 0.001}
    text = report.tables([fast, slow])
    assert cells(text, "PrefillShare, LoRA, tail 1, learning rate 0.01")[3].startswith("100.0")
    assert cells(text, "PrefillShare, LoRA, tail 1, learning rate 0.001")[3].startswith("0.0")


def test_sweeps_of_learning_rates_are_shown_with_the_best():
    runs = []
    for rate, right in ((1e-3, "110"), (3e-3, "111"), (1e-2, "100")):
        run = result("lora", "1")
        run["learning_rate"] = rate
        run["evaluations"] = {"validation": {"accuracy": right.count("1") / 3, "correct": right}}
        runs.append(run)
    text = report.tables(runs)
    tried = "0.001: 66.7, **0.003: 100.0**, 0.01: 33.3"
    assert f"| t | PrefillShare, LoRA, tail 1 | 1,600 | {tried} |" in text.splitlines()
    assert "Learning rates" not in report.tables(runs[:1])


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
    for name, accuracy in (("0-2", "25.0 ("), ("0-3", "75.0 (")):
        found = cells(text, f"layers {name} computed anew (full fine-tuning)")
        assert found[3].startswith(accuracy)
    assert "layers 2-4" not in text


def test_accuracy_is_plotted_against_the_prefill_that_is_saved(tmp_path):
    old, new = result("lora", "10"), result("prefillshare", "11")
    assert rows.saved(old, "test", [old]) is None
    new["evaluations"]["test"] |= {"saved": 0.75, "prompt_tokens": 80}
    assert rows.saved(new, "test", [old, new]) == 0.75
    old["tail"] = 10
    assert rows.saved(old, "test", [old, new]) == pytest.approx(0.75)
    full = result("full", "11")
    full["evaluations"][NAIVE] = {"accuracy": 0.0, "correct": "00"}
    assert rows.saved(full, "test", [full]) == 0
    assert rows.saved(full, NAIVE, [full]) == 1
    # The module always reads the last of the 40 tokens itself.
    assert rows.saved(full, NAIVE, [full, new]) == pytest.approx(39 / 40)
    half = NAIVE.replace("1.0", "0.5")
    full["evaluations"][half] = {"accuracy": 0.0, "correct": "00"}
    assert rows.saved(full, half, [full, new]) == 0.5
    assert plots.plot_saved([full, old, new], "t", tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes().startswith(b"\x89PNG")
    # Two points are a line of a table.
    assert not plots.plot_saved([old, new], "t", tmp_path / "none.png")


def test_lines_join_tails_and_shares_of_as_much_data():
    full = result("full", "1111")
    evaluations = full["evaluations"]
    for share, right in ((0.25, "1110"), (1.0, "0000")):
        evaluations[f"test, share {share}"] = {"accuracy": 0, "correct": right}
    for name in ("validation, layers 0-2", "test, layers 0-2"):
        evaluations[name] = {"accuracy": 0.5, "correct": "1100", "saved": 0.5}
    tails = [result("lora", "1110"), result("lora", "1111"), result("lora", "1111")]
    for lora, tail, saved in zip(tails, (1, 32, 8), (0.99, 0.6, 0.9), strict=True):
        lora["tail"] = tail
        lora["evaluations"]["test"]["saved"] = saved
    tails[2]["examples"] = 3200
    examples, lines = plots.saved_lines([full, *tails])
    assert examples == 1600
    assert {name: sorted(points) for name, points in lines.items()} == {
        "full fine-tuning": [(0, 100, "")],
        "naive sharing (full fine-tuning)": [(25, 75, ""), (100, 0, "")],
        "layers computed anew (full fine-tuning)": [(50, 50, "layers 0-2")],
        "PrefillShare, LoRA": [(60, 100, "tail 32"), (99, 75, "tail 1")],
    }


def test_only_runs_with_all_shares_are_plotted(tmp_path):
    full = result("full", "10")
    full["evaluations"][NAIVE] = full["evaluations"]["test"]
    assert not plots.plot_shares([full], "t", tmp_path / "plot.png")
    for share in SHARES:
        full["evaluations"][f"test, share {share}"] = full["evaluations"]["test"]
    assert plots.plot_shares([full], "t", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()
