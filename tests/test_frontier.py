"""The study of preferences: its estimator, what it reads from runs, that it goes on where it stopped and draws."""

import itertools
import json
import math
import re
import shlex
import sys

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, load_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import frontier


def test_best_of_n_by_enumeration():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    for n in (1, 2, 5, 7):
        chosen = [[row[max(group, key=lambda i: s[i])] for group in itertools.combinations(range(7), n)]
                  for s, row in zip(scores.tolist(), values.tolist(), strict=True)]  # fmt: skip
        assert frontier.best_of(n, scores, values) == pytest.approx(np.mean(chosen))


def test_best_of_n_draws_once_a_seed(tmp_path, monkeypatch):
    """Chosen by gold itself, gold and the reward model's score are one, and rise with n."""
    monkeypatch.setattr(frontier, "PROMPTS", 1)
    data, script = ROOT / "rlhf" / "data", frontier.load_script("rlhf/rlhf_ppo.py")
    given = (1, data / "tiny_lm", data / "gold" / "gold.py:score", tmp_path)
    first = frontier.best_of_n(*given)
    golds = [point["gold"] for point in first]
    assert golds == pytest.approx([point["reward"] for point in first], abs=1e-5)
    assert golds == sorted(golds) and golds[0] == pytest.approx(0, abs=1e-6) and golds[-1] > 2
    monkeypatch.setattr(script, "write", None)  # the texts are there
    assert [point["gold"] for point in frontier.best_of_n(*given)] == golds


def test_points_of_a_run(tmp_path):
    keys = ["gold", "reward", "kl", "distinct_2", "length"]
    rows = [["step", "seconds", *(f"eval/{key}" for key in keys)], [64, 1.0, *[""] * 5], [128, 2.0, 3, 0.5, 4, 0.8, 11]]
    (tmp_path / "metrics.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    before, after = (dict(zip(keys, values, strict=True)) for values in ((1, 0, 0, 0.9, 12), (2, 1.5, 5, 0.7, 10)))
    summary = {"before": before | {"gold_std": 2.0}, "after": after, "train_seconds": 3.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = frontier.points_in(tmp_path)
    assert [point["point"] for point in found] == ["0", "128", "end"]
    assert [point["gold"] for point in found] == [0, 1, 0.5]  # in deviations of the first texts
    assert found[1]["seconds"] == 2.0 and found[-1]["reward"] == 1.5


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "RESULTS", tmp_path / "frontier.csv")
    monkeypatch.setattr(frontier, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(frontier, "FIGURES", {name: tmp_path / f"{name}.png" for name in frontier.FIGURES})
    (tmp_path / "page.md").write_text("# Benchmarks\n\nBefore.\n")
    commands, summary = [], json.dumps({"reward_accuracy": 0.7, "reward_accuracy_gold": 0.77})

    def run(script, flags, folder):
        commands.append((script, flags))
        made = folder / "run"
        (made / "reward_model").mkdir(parents=True)
        (made / "summary.json").write_text(summary)
        return made

    def base_of(seed, work):
        (work / f"base{seed}").mkdir(exist_ok=True)
        (work / f"base{seed}" / "summary.json").write_text(summary)
        return work / f"base{seed}"

    points = [{"point": p, "seconds": 1.0, "gold": g, "reward": g, "kl": k, "distinct_2": 0.8, "length": 12.0}
              for p, g, k in (("0", 0.0, 0.0), ("64", 0.5, 1.0), ("end", 1.0, 4.0))]  # fmt: skip
    best = [{"point": str(n), "seconds": 1.0, "gold": math.log(n), "reward": math.log(n), "kl": math.log(n) - 1 + 1 / n,
             "length": 12.0} for n in (1, 4, 16, 64, 256, 1024)]  # fmt: skip
    monkeypatch.setattr(frontier, "run", run)
    monkeypatch.setattr(frontier, "base_of", base_of)
    monkeypatch.setattr(frontier, "points_in", lambda folder: [dict(point) for point in points])
    monkeypatch.setattr(frontier, "best_of_n", lambda seed, sft, reward, work: best)
    return tmp_path, commands


def test_study_goes_on_where_it_stopped_and_draws(home):
    folder, commands = home
    runs = len(frontier.RUNS) - 1 + len(frontier.COUNTS) + 2  # PPO's default is the base; two more reward models
    frontier.measure([301], "dpo", folder)
    assert commands and all(re.search("/sft --(loss|beta|learning-rate) ", flags) for _, flags in commands)
    frontier.measure([301, 302], "", folder)
    assert len(commands) == 2 * runs
    frontier.measure([301, 302], "", folder)
    assert len(commands) == 2 * runs
    assert {path.name for path in folder.glob("reward*")} == {
        f"reward{s}_{n}" for s in (301, 302) for n in ("1,000", "5,000")
    }
    ends = [row for row in frontier.read() if row["point"] == "end" and row["method"].startswith("PPO")]
    assert ends and all(row["reward_accuracy_gold"] == 0.77 for row in ends)
    judged = [flags for script, flags in commands if "kl-coef 0.01" in flags]
    assert sorted(flags.split("reward-model ")[1].split("/")[-2] for flags in judged) == sorted(
        name for seed in (301, 302) for name in (f"base{seed}", f"reward{seed}_1,000", f"reward{seed}_5,000")
    )
    frontier.publish()
    page = (folder / "page.md").read_text()
    assert page.startswith("# Benchmarks\n\nBefore.\n") and "frontier.png" in page
    assert "| PPO | β 0.03 | 2 | 1.00 [1.00, 1.00] | 1.00 | 4.00 | 0.80 | 12.00 |" in page
    assert "| best-of-n | 20,000 comparisons, n = 64 | 2 | 4.16 [4.16, 4.16] | 4.16 | 3.17 |  | 12.00 |" in page
    assert "| held-out pairs as gold orders them |" + " 0.770 [0.770, 0.770] |" * 3 in page
    for path in frontier.FIGURES.values():
        assert matplotlib.image.imread(path)[..., :3].reshape(-1, 3).std() > 0.02


def test_flags_are_known_to_the_scripts():
    for script, flags in [run[2:] for run in frontier.RUNS] + [
        ("rlhf_ppo", flags) for flags in frontier.COUNTS.values()
    ]:
        load_script(f"rlhf/{script}.py").parse_args(shlex.split(flags))
