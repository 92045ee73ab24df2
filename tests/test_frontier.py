"""The study of preferences goes on where it stopped, draws what is there, and its flags are those of the scripts."""

import json
import math
import sys

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, load_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import frontier


def points(scale: float) -> list[dict]:
    values = {"judge": 0.5, "score": 0.0, "vader": 0.1, "distinct_2": 0.9, "length": 12.0, "ref_perplexity": 40.0}
    along = [{"point": str(64 * k), "seconds": 1.0 * k, "kl": scale * k} | values | {"judge": 0.5 + 0.01 * scale * k}
             for k in (1, 2)]  # fmt: skip
    return [*along, along[-1] | {"point": "end"}]


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name, path in (("RESULTS", "frontier.csv"), ("FIGURE", "frontier.png"), ("PAGE", "page.md")):
        monkeypatch.setattr(frontier, name, tmp_path / path)
    (tmp_path / "page.md").write_text("# Benchmarks\n\nBefore.\n")
    commands = []
    monkeypatch.setattr(frontier, "run", lambda script, flags, folder: commands.append((script, flags)))
    monkeypatch.setattr(frontier, "base_of", lambda seed, work: work / f"base{seed}")
    monkeypatch.setattr(frontier, "points_in", lambda folder: points(len(commands)))
    monkeypatch.setattr(frontier, "points_of_study", lambda seed: points(3))
    best = [{**points(1)[0], "point": str(2**k), "kl": k * math.log(2) - 1 + 0.5**k, "judge": 0.5 + 0.05 * k}
            for k in range(7)]  # fmt: skip
    monkeypatch.setattr(frontier, "best_of_n", lambda seed, base: best)
    return tmp_path, commands


def test_study_goes_on_where_it_stopped_and_draws(home):
    folder, commands = home
    frontier.measure([101], "dpo", folder)
    assert len(commands) == 2  # DPO's default is the base itself, PPO's has been run
    for script, flags in commands:  # all start from one SFT model, reward model and pairs
        assert "/sft --sft-epochs 0 --reward-model " in flags and "/reward_model" in flags
        assert ("/pairs " in flags) == (script == "dpo")
    frontier.measure([101, 102], "", folder)
    assert len(commands) == 2 * (len(frontier.RUNS) - 2)
    frontier.measure([101, 102], "", folder)
    assert len(commands) == 2 * (len(frontier.RUNS) - 2)
    rows = frontier.read()
    assert {row["seed"] for row in rows} == {101, 102}
    frontier.publish()
    page = (folder / "page.md").read_text()
    assert page.startswith("# Benchmarks\n\nBefore.\n") and "frontier.png" in page
    assert page.count("\n| ") == 2 + 4 + len(frontier.RUNS)
    assert (
        "| PPO | β 0.02 | 2 |" in page
        and "| best-of-n | n = 64 | 2 | 0.800 [0.800, 0.800] | 0.00 | at most 3.17 |" in page
    )
    image = matplotlib.image.imread(folder / "frontier.png")[..., :3]
    assert image.reshape(-1, 3).std() > 0.02
    for color in frontier.METHODS.values():
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(image - wanted).max(-1) < 0.02).any(), color


def test_points_of_a_run_leave_out_what_came_before(tmp_path):
    keys = [f"eval/{name}" for name in frontier.MEASURED]
    rows = [["step", "seconds", "rewards/margins", *keys], [100, 5.0, "", *[""] * 7], [110, 9.0, "0.1", *[""] * 7],
            [120, 10.0, "0.2", *["0.5"] * 7], [140, 12.0, "0.3", *["0.7"] * 7]]  # fmt: skip
    (tmp_path / "metrics.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(
        json.dumps({k: dict.fromkeys(frontier.MEASURED, x) for k, x in (("before", 0.4), ("after", 0.6))})
    )
    found = frontier.points_in(tmp_path)
    assert [point["point"] for point in found] == ["0", "20", "40", "end"]  # 10 steps before the first report
    assert [point["judge"] for point in found] == [0.4, 0.5, 0.7, 0.6]
    assert [point["seconds"] for point in found][2:] == pytest.approx([4.0, 4.0])  # 40 steps at 10 a second


def test_flags_are_known_to_the_scripts(tmp_path):
    for _, _, script, flags in frontier.RUNS:
        module = load_script(f"rlhf/{script}.py")
        module.validate(module.parse_args(module.Args, module.PRESETS, flags.split()))
