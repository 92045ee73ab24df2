"""What does a nat of KL buy? PPO, DPO and its family, best-of-n and imitation from one and the same start.

    python benchmarks/frontier.py                     runs what is not there yet, draws, writes the table
    python benchmarks/frontier.py --draw-only
    python benchmarks/frontier.py --only dpo --seeds 104 105

For each seed one run of `rlhf/dpo.py` makes the SFT model, the reward model and the pairs, and is itself DPO's
middle point; every other run starts from these, but for PPO's default: `python benchmarks/run.py rlhf` has run it,
and its first two stages are the same computation. Seconds are those of the method's own training, its periodic
evaluations included. Final points are measured on 384 held-out prompts, points along the way on 128. Best-of-n
draws 64 texts to each of 192 held-out prompts from the SFT model and takes the one that the reward model scores
highest of every n; its KL is at most log n - (n - 1) / n. Results: results/frontier.csv, one row a point.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from figure import COLORS
from run import HOME, PAGE, ROOT, collect, load_script, number, replace_between, write_whole
from studies import RLHF_STUDY

RESULTS, FIGURE = HOME / "results" / "frontier.csv", HOME / "figures" / "frontier.png"
SEEDS = (103, 104, 105)
PROMPTS, DRAWS = 192, 64
# method, setting, script, flags; the same method's settings are joined by a line in the figure
RUNS = [
    ("PPO", "β 0.05", "rlhf_ppo", ""),
    ("DPO", "β 0.1", "dpo", ""),
    *(("DPO", f"β {x:g}", "dpo", f"--beta {x:g}") for x in (0.03, 0.3)),
    ("IPO", "β 0.1", "dpo", "--loss ipo --beta 0.1"),
    ("KTO", "β 0.1", "dpo", "--loss kto --total-episodes 4096 --batch-size 64"),
    ("ORPO", "β 0.5", "dpo", "--loss orpo --beta 0.5"),
    ("SimPO", "β 2, γ 0.5", "dpo", "--loss simpo"),
    ("SFT on the chosen", "ORPO, β 1e-9", "dpo", "--loss orpo --beta 1e-9"),
    *(("PPO", f"β {x:g}", "rlhf_ppo", f"--kl-coef {x:g}") for x in (0.15, 0.02)),
]
METHODS = {"best-of-n": "#1b1b1e"} | dict(zip(dict.fromkeys(run[0] for run in RUNS), COLORS, strict=False))
MEASURED = ("kl", "judge", "score", "vader", "distinct_2", "length", "ref_perplexity")
COLUMNS = ("seed", "method", "setting", "point", "seconds", *MEASURED)


def read() -> list[dict[str, Any]]:
    """The points measured so far; numbers as numbers."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row | {key: float(row[key]) for key in ("seconds", *MEASURED)} | {"seed": int(row["seed"])} for row in rows]


def append(rows: list[dict[str, Any]]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(
            {key: f"{row[key]:.5g}" if isinstance(row[key], float) else row[key] for key in COLUMNS} for row in rows
        )


# Runs ------------------------------------------------------------------------------------------


def run(script: str, flags: str, folder: Path) -> Path:
    """What `python rlhf/<script>.py flags` does, without the seconds of starting; the run folder."""
    module = load_script(f"rlhf/{script}.py")
    with contextlib.redirect_stdout(io.StringIO()):
        return module.train(module.parse_args(module.Args, module.PRESETS, [*flags.split(), "--run-dir", str(folder)]))


def base_of(seed: int, work: Path) -> Path:
    """The run folder with the seed's SFT model, reward model and pairs, made where there is none."""
    base = work / f"base{seed}"
    if not base.exists():
        making = work / f"making{seed}"
        shutil.rmtree(making, ignore_errors=True)
        run("dpo", f"--seed {seed}", making)
        next(making.iterdir()).rename(base)
    return base


def measured(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    return {key: float(row[prefix + key]) for key in MEASURED}


def points_of(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations before a run, under "0", along it, from the rows of its metrics, and after it, under "end"."""
    rows = [row for row in rows if row.get("objective/kl") or row.get("rewards/margins")]  # the method's own
    steps, seconds = (np.array([float(row[key]) for row in rows]) for key in ("step", "seconds"))
    unit = steps[1] - steps[0]  # what came before the first report is known in steps, not in seconds
    own = (seconds - seconds[0]) * (steps[-1] - steps[0] + unit) / (steps[-1] - steps[0])
    points = [{"point": str(int(step - steps[0] + unit)), "seconds": second} | measured(row, "eval/")
              for row, step, second in zip(rows, steps, own, strict=True) if row["eval/kl"]]  # fmt: skip
    ends = [("0", 0.0, "before"), ("end", own[-1], "after")]
    before, after = ({"point": name, "seconds": s} | measured(summary[key]) for name, s, key in ends)
    return [before, *points, after]


def points_in(folder: Path) -> list[dict[str, Any]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return points_of(list(csv.DictReader(file)), json.loads((folder / "summary.json").read_text()))


def points_of_study(seed: int) -> list[dict[str, Any]]:
    """PPO's default run, from the results of the study rlhf; nothing where it has not run."""
    default = next(variant for variant in RLHF_STUDY.variants if not variant.flags)
    for record in collect(RLHF_STUDY)[default]:
        if record["seed"] == seed and not record["error"]:
            columns = record["metrics"]
            rows = [
                {key: "" if np.isnan(x[n]) else x[n] for key, x in columns.items()} for n in range(len(columns["step"]))
            ]
            return points_of(rows, record["summary"])
    print(f"seed {seed} PPO: not there yet; python benchmarks/run.py rlhf --only default")
    return []


def best_of_n(seed: int, base: Path) -> list[dict[str, Any]]:
    dpo = load_script("rlhf/dpo.py")
    args = dpo.Args(seed=seed)
    tokenizer, lm = dpo.load_lm(str(base / "sft"))
    reward, judges = dpo.Reward(str(base / "reward_model"), lm, tokenizer, -1), dpo.Judges(args)
    prompts = dpo.make_prompts(args, tokenizer, dpo.load_split(args.dataset, args.eval_split))[:PROMPTS]
    rng, began = np.random.default_rng([seed, 9]), time.perf_counter()
    found: dict[str, list[Any]] = {name: [] for name in ("texts", "heads", "scores", "lengths", "nlls")}
    for i in range(0, len(prompts), 4):
        rows = [prompt for prompt in prompts[i : i + 4] for _ in range(DRAWS)]
        ids, mask = dpo.pad(rows, tokenizer.pad_token_id, "left")
        uniforms = torch.from_numpy(rng.random((len(rows), args.response_length), np.float32))
        tokens, response, logprobs = dpo.sample(lm, ids, mask, uniforms, tokenizer.eos_token_id, tokenizer.pad_token_id,
                                                args.temperature)  # fmt: skip
        texts = dpo.decode(tokenizer, torch.cat((ids, tokens), 1), torch.cat((mask, response), 1))
        found["texts"] += texts
        found["heads"] += dpo.decode(tokenizer, rows)
        found["scores"] += reward.score(texts).tolist()
        found["lengths"] += response.sum(1).tolist()
        found["nlls"] += (-(logprobs * response).sum(1)).tolist()
    seconds = time.perf_counter() - began
    scores = np.array(found["scores"]).reshape(len(prompts), DRAWS)
    points = []
    for n in (2**k for k in range(7)):
        groups = scores.reshape(len(prompts), DRAWS // n, n)
        winners = groups.argmax(2) + np.arange(DRAWS // n) * n + np.arange(len(prompts))[:, None] * DRAWS
        winners = winners[:, :16]  # groups are repetitions; distinct-2 is a matter of one text a prompt
        texts = [found["texts"][w] for w in winners.flatten()]
        first = [found["texts"][w][len(found["heads"][w]) :] for w in winners[:, 0]]
        lengths, nlls = (np.array(found[name])[winners] for name in ("lengths", "nlls"))
        point = {"point": str(n), "seconds": seconds * n / DRAWS, "kl": math.log(n) - (n - 1) / n, **judges(texts)}
        point |= {"score": float(np.array(found["scores"])[winners].mean()), "distinct_2": dpo.distinct_2(first)}
        point |= {"length": float(lengths.mean()), "ref_perplexity": math.exp(nlls.sum() / lengths.sum())}
        points.append(point)
    return points


def measure(seeds: Sequence[int], only: str, work: Path) -> None:
    torch.set_num_threads(1)
    for seed in seeds:
        done = {(row["method"], row["setting"]) for row in read() if row["seed"] == seed}
        jobs = [("best-of-n", "", "", ""), *RUNS]
        for method, setting, script, flags in jobs:
            if (method, setting) in done or only.lower() not in f"{method} {setting}".lower():
                continue
            base = base_of(seed, work)
            if method == "best-of-n":
                points = best_of_n(seed, base)
            elif not flags:
                points = points_in(base) if script == "dpo" else points_of_study(seed)
            else:
                start = f"--seed {seed} --model {base}/sft --sft-epochs 0 --reward-model {base}/reward_model"
                pairs = f" --pairs {base}/pairs" if script == "dpo" else ""
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    points = points_in(run(script, f"{start}{pairs} {flags}", Path(folder)))
            if not points:
                continue
            append([{"seed": seed, "method": method, "setting": setting} | point for point in points])
            last = " ".join(f"{key} {points[-1][key]:.2f}" for key in ("judge", "score", "kl", "distinct_2"))
            print(f"seed {seed} {method} {setting}: {last}, {points[-1]['seconds']:.0f} s", flush=True)


# Figure and table ------------------------------------------------------------------------------


def mean_over_seeds(rows: list[dict[str, Any]], points: list[str], key: str) -> np.ndarray:
    """The mean over seeds at each of the points."""
    return np.array([np.mean([row[key] for row in rows if row["point"] == point]) for point in points])


def root(kl: Any) -> np.ndarray:
    return np.sqrt(np.maximum(kl, 0))


def draw(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"judge": "judge that no method saw: P(positive)", "score": "score of the reward model itself",
              "distinct_2": "variety (distinct-2)"}  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(14.5, 5), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for method, color in METHODS.items():
            here = [row for row in rows if row["method"] == method]
            if method == "best-of-n" and here:
                points = sorted({row["point"] for row in here}, key=int)
                x, y = (mean_over_seeds(here, points, k) for k in ("kl", key))
                axis.plot(
                    root(x), y, color=color, linestyle="--", marker="o", markersize=3.5, linewidth=1.4, label=method
                )
                where = (root(x)[-1], y[-1])
                axis.annotate(f"n = {points[-1]}", where, (6, -3), textcoords="offset points", fontsize=8)
                continue
            ends = []
            settings = dict.fromkeys(row["setting"] for row in here)
            for setting in settings:
                mine = [row for row in here if row["setting"] == setting]
                along = sorted({row["point"] for row in mine if row["point"] != "end"}, key=int)
                x, y = (mean_over_seeds(mine, along, k) for k in ("kl", key))
                axis.plot(root(x), y, color=color, linewidth=0.9, alpha=0.45)
                last = [row for row in mine if row["point"] == "end"]
                axis.plot([root(row["kl"]) for row in last], [row[key] for row in last], ".", color=color, alpha=0.4)
                ends.append((root(np.mean([row["kl"] for row in last])), np.mean([row[key] for row in last])))
                if key == "judge" and len(settings) > 1:
                    axis.annotate(setting, ends[-1], (6, -10), textcoords="offset points", fontsize=8, color=color)
            if ends:
                ends = sorted(ends)
                axis.plot(
                    *zip(*ends, strict=True), "o", color=color, markersize=7.5, markeredgecolor="white", label=method
                )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("√KL from the SFT model, nats a text")
        axis.set_xlim(0, 1.08 * axis.get_xlim()[1])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=8, frameon=False)
    figure.suptitle("What a nat of KL buys: means of seeds (small dots), thin lines along training", fontsize=12)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)


def table(rows: list[dict[str, Any]]) -> str:
    header = ["method", "setting", "seeds", "judge, mean [worst, best]", "reward model's score", "KL, nats a text",
              "distinct-2", "length", "reference perplexity", "seconds of training"]  # fmt: skip
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    shown = [("best-of-n", "", str(n)) for n in (1, 4, 16, 64)]
    shown += [(run[0], run[1], "end") for run in sorted(RUNS, key=lambda run: list(METHODS).index(run[0]))]
    for method, setting, point in shown:
        here = [row for row in rows if (row["method"], row["setting"], row["point"]) == (method, setting, point)]
        if not here:
            continue
        judge = [row["judge"] for row in here]
        means = [
            np.mean([row[key] for row in here]) for key in ("score", "kl", "distinct_2", "length", "ref_perplexity")
        ]
        name = f"n = {point}" if method == "best-of-n" else setting
        kl = ("at most " if method == "best-of-n" else "") + f"{means[1]:.2f}"
        cells = [method, name, str(len(here)), f"{np.mean(judge):.3f} [{min(judge):.3f}, {max(judge):.3f}]",
                 f"{means[0]:.2f}", kl, f"{means[2]:.2f}", f"{means[3]:.1f}", number(means[4]),
                 f"{np.mean([row['seconds'] for row in here]):.0f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted({row["seed"] for row in rows})
    lines += [
        "",
        f"Seeds {', '.join(map(str, seeds))}. Best-of-n's seconds are those of writing n texts to all prompts.",
    ]
    return "\n".join(lines)


def publish() -> None:
    rows = read()
    if not rows:
        return
    draw(rows)
    section = """## Preferences: what a nat of KL buys

From the same SFT model, reward model and pairs: how much better do PPO, DPO and its family write at which
distance from where they started, and how does that compare with simply taking the best of n samples?

    python benchmarks/frontier.py

![What a nat of KL buys](benchmarks/figures/frontier.png)"""
    page = PAGE.read_text(encoding="utf-8")
    write_whole(PAGE, replace_between(page, "results:frontier", table(rows), section).encode())
    print(f"{PAGE.name}, benchmarks/figures/{FIGURE.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="", help="only methods whose name and setting contain this")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "frontier", help="folder of the models of each seed"
    )
    parser.add_argument("--draw-only", action="store_true")
    args = parser.parse_args()
    if not args.draw_only:
        args.work.mkdir(parents=True, exist_ok=True)
        measure(args.seeds, args.only, args.work)
    publish()


if __name__ == "__main__":
    main()
