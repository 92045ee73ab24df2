"""The benchmarks' instrument: a small study end to end, its results damaged in every way, and its statistics."""

import dataclasses
import gzip
import json
import re
import sys

import gymnasium as gym
import matplotlib.pyplot
import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, load_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import figure
import run
import studies
from studies import Group, Panel, Study, Variant

TINY = "--total-timesteps 4000 --num-envs 4 --num-steps 128 --eval-episodes 2"
GOOD = Variant("good", "algos/ppo.py", "CartPole-v1", TINY)
BAD = Variant("bad", "algos/ppo.py", "CartPole-v1", "--gamma 7")
STUDY = Study("small", "A small study", "Does the instrument work?",
              [Group("all", [GOOD, BAD], [Panel("charts/episodic_return", "return")])])  # fmt: skip

PAGE = """# Benchmarks

Prose before.

<!-- results:small -->
an old table
<!-- /results:small -->

Prose | after, with <!-- a comment -->.
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HOME", tmp_path / "benchmarks")
    monkeypatch.setattr(run, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setitem(studies.STUDIES, "small", STUDY)
    (tmp_path / "benchmarks.md").write_text(PAGE)
    return tmp_path


def test_study_end_to_end(home, capsys):
    run.main(["small", "--seeds", "3"])
    printed = capsys.readouterr().out
    assert "6 runs to do, 0 are there" in printed and "MISS: error: --gamma must be in [0, 1]" in printed
    results = {file.name: file.read_bytes() for file in (home / "benchmarks" / "results" / "small").iterdir()}
    assert len(results) == 12  # two whole files for each run, a miss included, and nothing half-written

    # What the record says is what the page says.
    record, problem = run.read_back(STUDY, GOOD, 301)
    assert record["command"] == f"python algos/ppo.py --env CartPole-v1 --seed 301 {TINY}" and not problem
    assert record["summary"]["steps"] >= 4000 and record["metrics"]["step"][-1] == record["summary"]["steps"]
    assert str(home) not in json.dumps({k: v for k, v in record.items() if k != "metrics"})
    scores = [run.read_back(STUDY, GOOD, seed)[0]["summary"]["eval_return_mean"] for seed in (301, 302, 303)]
    page = (home / "benchmarks.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| good"))
    assert "| 3/3 |" in row and "| 0/3 |" in row
    assert f"| {run.number(np.mean(scores))} [" in row
    assert f"| {run.number(min(scores))} / {run.number(max(scores))} |" in row
    assert "| 0/3 |" in next(line for line in page.splitlines() if line.startswith("| bad"))
    assert page.count("**Miss**: bad (CartPole-v1), seed 30") == 3

    # Prose stays as it is, the old table is gone, the figure is a picture.
    before, after = page.split("<!-- results:small -->")[0], page.split("<!-- /results:small -->")[1]
    assert before == PAGE.split("<!-- results:small -->")[0] and "an old table" not in page
    assert after.startswith(PAGE.split("<!-- /results:small -->")[1].rstrip("\n"))
    assert (home / "benchmarks" / "figures" / "small.png").read_bytes().startswith(b"\x89PNG")

    # Damage: a truncated and a swapped metrics file, half a record; each is run again and gives the same metrics.
    folder = home / "benchmarks" / "results" / "small"
    csvs, jsons = sorted(folder.glob("good*.csv.gz")), sorted(folder.glob("good*.json"))
    csvs[0].write_bytes(csvs[0].read_bytes()[:-20])
    csvs[1].write_bytes(csvs[2].read_bytes())
    jsons[2].write_text(jsons[2].read_text()[:100])
    run.main(["small", "--seeds", "3", "--draw-only"])
    assert "| good |" not in (home / "benchmarks.md").read_text()  # nothing damaged reaches the table
    capsys.readouterr()
    run.main(["small", "--seeds", "3"])
    printed = capsys.readouterr().out
    assert "good-cartpole-v1 seed 301 its two files do not belong together: run again" in printed
    assert "good-cartpole-v1 seed 302 its two files do not belong together: run again" in printed
    assert "good-cartpole-v1 seed 303 is damaged (JSONDecodeError): run again" in printed
    assert "3 runs to do, 3 are there" in printed
    again = [run.read_back(STUDY, GOOD, seed)[0]["summary"]["eval_return_mean"] for seed in (301, 302, 303)]
    assert again == scores


def write_result(study, variant, seed, metrics="step,a/b\n1,2\n3,4\n", **summary):
    """A result as a run would leave it, without running anything."""
    csv_file, json_file = run.files_of(study, variant, seed)
    packed = run.pack(metrics)
    record = {"command": run.command_of(variant, seed), "seed": seed, "error": None, "summary": summary,
              "wall_seconds": 1.0, "peak_memory_mb": 10.0, "versions": {"torch": "2"},
              "machine": {"cpu": "x", "cores": 2, "system": "y"},
              "metrics_sha256": run.hashlib.sha256(packed).hexdigest()}  # fmt: skip
    run.write_whole(csv_file, packed)
    run.write_whole(json_file, json.dumps(record).encode())
    return csv_file, json_file


def test_what_counts_as_done(home):
    csv_file, json_file = write_result(STUDY, GOOD, 301, eval_return_mean=1.0)
    assert run.read_back(STUDY, GOOD, 301)[0]["metrics"]["a/b"].tolist() == [2, 4]
    assert run.read_back(STUDY, GOOD, 302) == (None, "")
    other = Variant(GOOD.label, GOOD.script, GOOD.env, GOOD.flags + " --gamma 0.9")
    assert run.read_back(STUDY, other, 301) == (None, "was run with other flags")
    whole = json.loads(json_file.read_text())
    settings = {"env": "CartPole-v1", "seed": 301, "gamma": 0.98, "total_timesteps": 4000}  # as the preset has it
    for gamma, problem in ((0.98, ""), (0.5, "was run with other settings: gamma")):
        json_file.write_text(json.dumps(whole | {"settings": settings | {"gamma": gamma}}))
        assert run.read_back(STUDY, GOOD, 301)[1] == problem
    pixels = Variant("pixels", "algos/dqn_atari.py", "ALE/Pong-v5", "--bf16")
    record = {"command": run.command_of(pixels, 301), "settings": {"env": "ALE/Pong-v5", "bf16": True}}
    assert run.changed_settings(pixels, record) == []  # what was typed may differ from the preset
    csv_file.unlink()
    assert run.read_back(STUDY, GOOD, 301) == (None, "is half finished")
    csv_file.write_bytes(b"not gzip")
    broken = json.loads(json_file.read_text()) | {"metrics_sha256": run.hashlib.sha256(b"not gzip").hexdigest()}
    json_file.write_text(json.dumps(broken))
    assert run.read_back(STUDY, GOOD, 301)[1] == "is damaged (BadGzipFile)"


def test_a_result_is_out_of_date_once_its_script_computes_something_else(home, tmp_path, monkeypatch, capsys):
    for folder in ("algos", "benchmarks"):
        (tmp_path / folder).mkdir(exist_ok=True)
    script, ours = tmp_path / GOOD.script, (ROOT / GOOD.script).read_text()
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "STUDIES", {"small": STUDY})
    script.write_text(ours)
    write_result(STUDY, GOOD, 301, eval_return_mean=500.0, solved_step=10, solved_seconds=1.0, sps=1000)
    file = run.files_of(STUDY, GOOD, 301)[1]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code_sha256": run.code_digest(script)}))

    def listed() -> str:
        run.main([])
        return re.search(r"(\d+) runs there, +(\d+) out of date", capsys.readouterr().out)[2]

    assert listed() == "0"
    words = ours.replace("# Play.", "# Play a while.").replace('"""Generalized advantage', '"""Estimated advantage')
    settings = words.replace("seed: int = 1 ", "seed: int = 5 ").replace("# 8. Command line", "# 8. The command line")
    assert settings.count("Play a while") == settings.count("Estimated advantage") == settings.count("int = 5 ") == 1
    script.write_text(settings)
    assert listed() == "0"  # words, settings (each result knows its own) and the record are no computation
    script.write_text(ours.replace("deltas = rewards + gamma", "deltas = rewards - gamma"))
    assert listed() == "1"


def test_seeds_are_named_with_their_variant():
    found = {GOOD: [{"seed": 101}, {"seed": 110}], BAD: [{"seed": 201}, {"seed": 203}]}
    assert run.seeds_of(found) == "Seeds 101 to 110, 201 to 203 for bad (CartPole-v1)"


def test_lost_threshold_is_counted(home):
    for seed, (score, solved) in enumerate([(500.0, 1.0), (400.0, 3.0), (490.0, None)], start=301):
        write_result(STUDY, GOOD, seed, eval_return_mean=score, solved_step=solved and 10, solved_seconds=solved,
                     steps=1000, sps=10)  # fmt: skip
    row = run.table_row(STUDY, GOOD, run.collect(STUDY)[GOOD])
    assert row[6:8] == ["2/3, 1 lost", "2.00 (3.00)"]


def test_only_long_tables_lie_below_a_fold():
    for rows, folded in ((12, False), (13, True)):
        lines = ["| a |", "| --- |", *["| 1 |"] * rows]
        found = run.fold(lines, "A table")
        assert ("<details><summary>A table, 13 rows</summary>" in found) == folded
        assert [line for line in found if line.startswith("|")] == lines


def test_pendulum_counts_as_solved_at_a_mark(home):
    """It has no threshold of its own, and its runs know of none."""
    pendulum = dataclasses.replace(GOOD, env="Pendulum-v1")
    rows = "step,seconds,charts/episodic_return\n100,1,\n200,2,-900\n300,3,-199\n400,4,-150\n"
    for seed, metrics in ((301, rows), (302, rows.replace("-199", "-201").replace("-150", "-202"))):
        write_result(STUDY, pendulum, seed, metrics, eval_return_mean=-150.0, solved_step=None, steps=400, sps=10)
    records = [run.read_back(STUDY, pendulum, seed)[0] for seed in (301, 302)]
    assert [record["summary"].get("solved_step") for record in records] == [300, None]
    assert run.table_row(STUDY, pendulum, records)[6:8] == ["1/2", "3.00 (3.00)"]


def test_bootstrap_known_cases():
    # Two seeds, 0 and 1: the mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert [float(bound) for bound in figure.bootstrap(np.array([0.0, 1.0]))] == [0.0, 1.0]
    # Ten seeds, one of them 1: resampled means are Binomial(10, .1) / 10, with quantiles 0 and .3.
    assert np.allclose(figure.bootstrap(np.eye(10)[0]), (0.0, 0.3))
    # Many seeds: the normal interval of the mean; and every column of a curve is treated alone.
    values = np.random.default_rng(1).normal(5, 2, size=(400, 3))
    low, high = figure.bootstrap(values)
    error = values.std(0) / 20
    assert np.allclose(low, values.mean(0) - 1.96 * error, atol=0.15 * error.max())
    assert np.allclose(high, values.mean(0) + 1.96 * error, atol=0.15 * error.max())


def test_interquartile_mean_and_what_it_is_taken_over(home):
    assert figure.interquartile_mean(np.array([[0.0], [2.0], [4.0], [100.0]]))[0] == 3  # the outlier does not count
    scores = np.random.default_rng(1).normal(1, 0.1, size=(50, 4))
    middle, low, high = figure.interquartile_mean(scores)
    assert np.isclose(middle, scipy.stats.trim_mean(scores, 0.25, axis=None))
    assert 0.95 < low < middle < high < 1.05 and 0.015 < high - low < 0.05
    # Resampled task by task: seeds that agree in each task leave no doubt, however far apart the tasks are.
    assert figure.interquartile_mean(np.tile([0.0, 1.0], (5, 1)))[1:] == (0.5, 0.5)

    study = Study("two", "", "", [Group("", [GOOD])], random={"CartPole-v1": 25.0})
    for seed, score in ((301, 475.0), (302, 250.0)):
        write_result(study, GOOD, seed, eval_return_mean=score)
    assert run.aggregate_lines(study, run.collect(study))[2:] == ["- good: 0.750 [0.500, 1.000]"]
    alone = Study("two", "", "", [Group("", [GOOD])], random={"CartPole-v1": 25.0, "Acrobot-v1": -500.0})
    assert run.aggregate_lines(alone, run.collect(alone)) == []  # not run on all tasks


@pytest.mark.parametrize("env_id", sorted(studies.STUDIES["scores"].random))
def test_zero_of_the_aggregate_is_what_random_actions_obtain(env_id):
    env = gym.make(env_id)
    env.action_space.seed(1)
    returns = np.zeros(300)
    for episode in range(len(returns)):
        env.reset(seed=1 if episode == 0 else None)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += reward
            done = terminated or truncated
    error = returns.std() / len(returns) ** 0.5
    assert abs(returns.mean() - studies.STUDIES["scores"].random[env_id]) < 3 * error


def test_results_name_no_folder_of_the_machine():
    inside = str(ROOT / "rlhf" / "data" / "tiny_lm")
    assert run.here({"model": inside, "run_dir": "/x", "seed": 1}) == {"model": "rlhf/data/tiny_lm", "seed": 1}
    for file in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        assert not re.search(r'"/[a-z]', file.read_text()), file


def test_a_picture_of_the_first_seed_is_kept(home, monkeypatch):
    study = Study("small", "Small", "Does it work?", [Group("", [GOOD])], pictures=[(GOOD, "curves.png")])
    monkeypatch.setitem(studies.STUDIES, "small", study)
    run.main(["small", "--seeds", "2"])
    kept = home / "benchmarks" / "figures" / "small_curves.png"
    assert kept.read_bytes().startswith(b"\x89PNG")


def test_a_group_without_the_curve_gets_no_panel(home):
    write_result(STUDY, GOOD, 301)
    picture = home / "none.png"
    figure.draw(STUDY, run.collect(STUDY), picture)
    assert not picture.exists()  # the only group has no charts/episodic_return
    write_result(STUDY, GOOD, 301, metrics="step,charts/episodic_return\n1,2\n3,4\n")
    figure.draw(STUDY, run.collect(STUDY), picture)
    assert picture.exists()


def test_numbers_of_a_run():
    metrics = {"seconds": np.array([1.0, 2.0, np.nan, 4.0, 9.0]), "m/x": np.array([1.0, 5.0, 3.0])}
    record = {"summary": {"a": {"b": 2}}, "wall_seconds": 1, "peak_memory_mb": 3, "metrics": metrics}
    for key, value in {"seconds step": 2, "m/x": 3, "m/x max": 5, "a.b": 2, "a.c": None, "peak_memory_mb": 3,
                       "missing step": None}.items():  # fmt: skip
        assert figure.value_of(record, key) == value, key


def test_curves_share_the_grid_where_all_seeds_have_values():
    runs = [([0, 10, 20], [np.nan, 1.0, 3.0]), ([5, 15, 30], [0.0, 2.0, 2.0])]
    records = [{"error": None, "metrics": {"step": np.array(x, float), "m": np.array(y)}} for x, y in runs]
    grid, curves = figure.seed_curves(records, "m", "step")
    assert grid[0] == 10 and grid[-1] == 20
    assert np.allclose(curves[:, 0], [1, 1]) and np.allclose(curves[:, -1], [3, 2])
    seconds = [{"error": None, "metrics": {"seconds": np.array([0.1, 10.0]), "m": np.array([0.0, 1.0])}}]
    grid, curves = figure.seed_curves(seconds, "m", "seconds")  # as many points a decade
    assert np.isclose(grid[100] / grid[99], grid[-1] / grid[-2]) and np.allclose(curves, (grid - 0.1) / 9.9)


def test_a_pair_that_is_compared_shares_its_colour(home, monkeypatch):
    third = Variant("third", "algos/ppo.py", "CartPole-v1", "--hidden 8")
    panel = Panel("charts/episodic_return", "return", x="seconds")
    study = Study("pairs", "", "", [Group("", [GOOD, BAD, third], [panel])], ratios=[(GOOD, BAD)])
    for variant in (GOOD, BAD, third):
        write_result(study, variant, 301, metrics="seconds,charts/episodic_return\n1,2\n30,4\n")
    monkeypatch.setattr("matplotlib.pyplot.close", lambda _: None)
    figure.draw(study, run.collect(study), home / "pairs.png")
    (axis,) = matplotlib.pyplot.gcf().axes
    ours, theirs, other = axis.lines[:3]
    assert ours.get_color() == theirs.get_color() != other.get_color()
    assert [line.get_linestyle() for line in (ours, theirs, other)] == ["-", "--", "-"]
    assert axis.get_xscale() == "log"


def test_packed_metrics_keep_their_numbers():
    packed = run.pack("step,m\n1234567,0.123456789\n2,-1.5e-07\n3,\n")
    assert gzip.decompress(packed).decode() == "step,m\n1234567,0.12346\n2,-1.5e-07\n3,\n"
    assert packed == run.pack("step,m\n1234567,0.123456789\n2,-1.5e-07\n3,\n")  # no time stamp inside


def test_every_study_is_declared_completely():
    for name, study in studies.STUDIES.items():
        assert name == study.name and re.fullmatch(r"[a-z0-9_]+", name)
        for variant in study.variants:
            assert (ROOT / variant.script).is_file(), f"{name}: {variant.script} is missing"
            assert all(files.parent.name == (variant.home or name) for files in run.files_of(study, variant, 301))
    envs = {variant.env for variant in studies.SCORES.variants if variant.script == "algos/ppo.py"}
    assert {"CartPole-v1", "LunarLander-v3"} <= envs


def test_the_page_says_what_the_results_say():
    import memory_and_masks
    import overview

    page = (ROOT / "benchmarks.md").read_text()
    assert overview.overview_table() in page
    for study in studies.STUDIES.values():
        assert run.table(study, run.collect(study)) in page, f"python benchmarks/run.py {study.name} --draw-only"
    rows = memory_and_masks.read()
    assert memory_and_masks.table(rows) in page
    assert memory_and_masks.table([row | {"cpu": "another machine"} for row in rows]).endswith("of another machine.")


README_ROW = r"^\| .*? \| `python (algos/\w+\.py)(?: --env (\S+))?` \| (.*?) \|"


def test_the_readme_says_what_the_results_say():
    found = run.collect(studies.SCORES) | run.collect(studies.MUJOCO)
    results = {(variant.script, variant.env): records for variant, records in found.items()}
    checked = []
    for script, env, score in re.findall(README_ROW, (ROOT / "README.md").read_text(), re.M):
        records = results.get((script, env or load_script(script).Args.env))
        said = re.match(r"(?:[A-Z]\w+ )?(-?[\d,.]+)(?: after \S+ steps)? \(worst .*?(-?[\d,.]+)\)", score)
        if records and said:
            returns = [record["summary"]["eval_return_mean"] for record in records]
            expected = [run.number(value).removesuffix(".0") for value in (np.mean(returns), min(returns))]
            assert [number.removesuffix(".0") for number in said.groups()] == expected, score
            checked.append(script)
    assert len(checked) >= 12 and "algos/sac.py" in checked
