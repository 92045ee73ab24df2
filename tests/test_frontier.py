"""The study of preferences goes on where it stopped, draws what is there, and its flags are those of the scripts."""

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
    monkeypatch.setattr(frontier, "points_of", lambda folder: points(len(commands)))
    best = [{**points(1)[0], "point": str(2**k), "kl": k * math.log(2) - 1 + 0.5**k, "judge": 0.5 + 0.05 * k}
            for k in range(7)]  # fmt: skip
    monkeypatch.setattr(frontier, "best_of_n", lambda seed, base: best)
    return tmp_path, commands


def test_study_goes_on_where_it_stopped_and_draws(home):
    folder, commands = home
    frontier.measure(1, "dpo", folder)
    assert len(commands) == 3
    frontier.measure(2, "", folder)
    assert len(commands) == 2 * len(frontier.RUNS)
    frontier.measure(2, "", folder)
    assert len(commands) == 2 * len(frontier.RUNS)
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


def test_flags_are_known_to_the_scripts(tmp_path):
    for _, _, script, flags in frontier.RUNS:
        module = load_script(f"rlhf/{script}.py")
        module.validate(module.parse_args(module.Args, module.PRESETS, flags.split()))
