"""What does a nat of KL buy, and when is it too much? PPO, DPO and its family, best-of-n, from one and the same start.

    python benchmarks/frontier.py                     runs what is not there yet, draws, writes the tables
    python benchmarks/frontier.py --draw-only
    python benchmarks/frontier.py --only dpo --seeds 304 305

For each seed one default run of `rlhf/rlhf_ppo.py` makes the SFT model and the reward model, and is itself PPO's
middle point; every other run starts from these, with the same preferences. Gold is what the raters say whose noisy
verdicts the preferences are, in standard deviations of the SFT model's texts; nobody optimises it. Final points are
measured on 384 held-out prompts, points along the way on 128. Best-of-n draws 1,024 texts to each of 32 held-out
prompts and takes of every n the one that the reward model scores highest (estimated without bias as in Gao 2022,
Appendix I); its KL is at most log n - (n - 1) / n. Results: results/frontier.csv, one row a point.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from figure import COLORS
from run import HOME, PAGE, ROOT, fold, load_script, replace_between, write_whole

RESULTS = HOME / "results" / "frontier.csv"
FIGURES = {"frontier": HOME / "figures" / "frontier.png", "overoptimisation": HOME / "figures" / "overoptimisation.png"}
SEEDS = (301, 302, 303, 304, 305)
PROMPTS, DRAWS = 32, 1024
# method, setting, script, flags; the settings of a method are points of one line in the figure
RUNS = [
    ("PPO", "β 0.17", "rlhf_ppo", ""),
    *(("PPO", f"β {x:g}", "rlhf_ppo", f"--kl-coef {x:g}") for x in (0.4, 0.03)),
    *(("DPO", f"β {x:g}", "dpo", f"--beta {x:g}") for x in (0.3, 0.1, 0.03)),
    ("DPO, pushed", "β 0.1, Adam 1e-3, no imitation", "dpo", "--learning-rate 1e-3 --sft-coef 0"),
    ("IPO", "β 0.1", "dpo", "--loss ipo"),
    ("KTO", "β 0.1", "dpo", "--loss kto --total-episodes 15360 --batch-size 64"),
    ("ORPO", "β 0.5", "dpo", "--loss orpo --beta 0.5"),
    ("SimPO", "β 2, γ 0.5", "dpo", "--loss simpo --beta 2"),
    ("SFT on the chosen", "ORPO, β 1e-9", "dpo", "--loss orpo --beta 1e-9"),
]
# the less the reward model has seen, the wider its score and gold part: comparisons, flags
COUNTS = {"1,000": '--reward-split "train[:1000]"', "5,000": '--reward-split "train[:5000]"', "20,000": ""}
LOW_PRICE = "--kl-coef 0.01 --total-episodes 7680"
COLOR = {"best-of-n": "#1b1b1e"} | dict(zip(dict.fromkeys(run[0] for run in RUNS), COLORS, strict=False))
MEASURED = ("gold", "reward", "kl", "distinct_2", "length")
ACCURACIES = ("reward_accuracy", "reward_accuracy_gold")
COLUMNS = ("seed", "method", "setting", "point", "seconds", *MEASURED, *ACCURACIES)


def read() -> list[dict[str, Any]]:
    """The points measured so far; numbers as numbers, NaN where nothing was measured."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = ("seconds", *MEASURED, *ACCURACIES)
    return [row | {key: float(row[key] or "nan") for key in numbers} | {"seed": int(row["seed"])} for row in rows]


def append(rows: list[dict[str, Any]]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


# Runs ------------------------------------------------------------------------------------------


def run(script: str, flags: str, folder: Path) -> Path:
    """What `python rlhf/<script>.py flags` does, without the seconds of starting; the run folder."""
    module = load_script(f"rlhf/{script}.py")
    with contextlib.redirect_stdout(io.StringIO()):
        return module.train(module.parse_args([*shlex.split(flags), "--run-dir", str(folder)]))


def base_of(seed: int, work: Path) -> Path:
    """The run folder with the seed's SFT model and reward model, made where there is none."""
    base = work / f"base{seed}"
    if not (base / "summary.json").exists():
        with tempfile.TemporaryDirectory(dir=work) as folder:
            run("rlhf_ppo", f"--seed {seed}", Path(folder)).rename(base)
    return base


def reward_run(seed: int, count: str, base: Path, work: Path) -> Path:
    """The run folder whose reward model has seen so many comparisons, made where there is none."""
    if not COUNTS[count]:
        return base
    made = work / f"reward{seed}_{count}"
    if not (made / "summary.json").exists():
        flags = f"--seed {seed} --sft-model {base}/sft {COUNTS[count]} --total-episodes 64"
        with tempfile.TemporaryDirectory(dir=work) as folder:
            run("rlhf_ppo", flags, Path(folder)).rename(made)
    return made


def points_in(folder: Path) -> list[dict[str, Any]]:
    """The evaluations before a run, under "0", along it, and after it, under "end"."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/kl"]]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before = summary["before"]

    def point(name: str, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
        values = {key: float(found[key]) for key in MEASURED if found.get(key) not in (None, "")}
        values["gold"] = (values["gold"] - before["gold"]) / before["gold_std"]
        return {"point": name, "seconds": seconds} | values

    along = [
        point(row["step"], float(row["seconds"]), {key: row.get(f"eval/{key}") for key in MEASURED}) for row in rows
    ]
    return [point("0", 0.0, before), *along, point("end", summary["train_seconds"], summary["after"])]


def best_of(n: int, scores: np.ndarray, values: np.ndarray) -> float:
    """The mean value of the text with the best score among n, over all choices of n of the N drawn; [P, N] each."""
    N = scores.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])  # text i is the best of its n
    ordered = np.take_along_axis(values, scores.argsort(1), 1)
    return float((ordered * weights).sum(1).mean())


def drawn(seed: int, sft_model: Path, work: Path) -> dict[str, Any]:
    """What best-of-n chooses from: 1,024 texts to each of 32 prompts with their gold and length, drawn once a seed."""
    file = work / f"drawn{seed}.json"
    if not file.exists():
        rlhf, began = load_script("rlhf/rlhf_ppo.py"), time.perf_counter()
        args = rlhf.Args(seed=seed)
        tokenizer, lm = rlhf.load_lm(str(sft_model))
        gold, rng = rlhf.load_function(args.gold), np.random.default_rng([seed, 9])
        found = {"texts": [], "gold": [], "length": []}
        for row in rlhf.load_rows(args, tokenizer, args.eval_split)[:PROMPTS]:
            uniforms = rng.random((DRAWS, args.max_completion_length), np.float32)
            batch, texts = rlhf.write(args, tokenizer, lm, [row] * DRAWS, uniforms)
            found["texts"].append(texts)
            found["gold"].append(rlhf.score(gold, [row] * DRAWS, texts).tolist())
            found["length"].append(batch["mask"].sum(1).tolist())
        write_whole(file, json.dumps(found | {"seconds": time.perf_counter() - began}).encode())
    return json.loads(file.read_text(encoding="utf-8"))


def best_of_n(seed: int, sft_model: Path, reward_model: Path, work: Path) -> list[dict[str, Any]]:
    rlhf = load_script("rlhf/rlhf_ppo.py")
    args, found = rlhf.Args(seed=seed), drawn(seed, sft_model, work)
    began = time.perf_counter() - found["seconds"]
    tokenizer, _ = rlhf.load_lm(str(sft_model))
    reward = rlhf.load_reward(str(reward_model), -1, torch.device("cpu"))
    rows = rlhf.load_rows(args, tokenizer, args.eval_split)[:PROMPTS]
    pairs = zip(rows, found["texts"], strict=True)
    scores = [rlhf.score(reward, [row] * DRAWS, texts).tolist() for row, texts in pairs]
    seconds = time.perf_counter() - began
    scores, golds, lengths = (np.array(x, float) for x in (scores, found["gold"], found["length"]))
    standard = [(x - x.mean()) / x.std() for x in (golds, scores)]
    return [
        {"point": str(n), "seconds": seconds * n / DRAWS, "kl": math.log(n) - (n - 1) / n,
         "gold": best_of(n, scores, standard[0]), "reward": best_of(n, scores, standard[1]),
         "length": best_of(n, scores, lengths)}
        for n in (1, 4, 16, 64, 256, 1024)
    ]  # fmt: skip


def measure(seeds: Sequence[int], only: str, work: Path) -> None:
    torch.set_num_threads(1)
    jobs = list(RUNS)
    for count in COUNTS:
        jobs += [(f"PPO, {count} comparisons", LOW_PRICE, "rlhf_ppo", LOW_PRICE),
                 ("best-of-n", f"{count} comparisons", "", "")]  # fmt: skip
    for seed in seeds:
        done = {(row["method"], row["setting"]) for row in read() if row["seed"] == seed}
        for method, setting, script, flags in jobs:
            if (method, setting) in done or only.lower() not in f"{method} {setting}".lower():
                continue
            base = base_of(seed, work)
            count = next((count for count in COUNTS if count in f"{method} {setting}"), "")
            judge = reward_run(seed, count, base, work) if count else base
            if method == "best-of-n":
                points = best_of_n(seed, base / "sft", judge / "reward_model", work)
            elif not flags:
                points = points_in(base)
            else:
                start = f"--sft-model {base}/sft --reward-model {judge}/reward_model"
                start = f"--model {base}/sft" if script == "dpo" else start
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    points = points_in(run(script, f"--seed {seed} {start} {flags}", Path(folder)))
            if script == "rlhf_ppo":  # how well its reward model orders held-out pairs
                summary = json.loads((judge / "summary.json").read_text(encoding="utf-8"))
                points[-1] |= {key: summary[key] for key in ACCURACIES}
            append([{"seed": seed, "method": method, "setting": setting} | point for point in points])
            last = " ".join(f"{key} {points[-1][key]:.2f}" for key in ("gold", "kl"))
            print(f"seed {seed} {method} {setting}: {last}, {points[-1]['seconds']:.0f} s", flush=True)


# Figures and tables ----------------------------------------------------------------------------


def curve(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """√KL and a measurement, means over seeds at each point but the last one."""
    points = sorted({row["point"] for row in rows if row["point"] != "end"}, key=int)
    x, y = ([np.mean([row[k] for row in rows if row["point"] == point]) for point in points] for k in ("kl", key))
    return np.sqrt(np.maximum(x, 0)), np.array(y)


def accuracies(rows: list[dict[str, Any]], count: str, key: str) -> list[float]:
    """How well each seed's reward model of so many comparisons orders held-out pairs."""
    return [row[key] for row in rows if row["method"] == f"PPO, {count} comparisons" and row["point"] == "end"]


def draw(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    for axis, key in zip(figure.subplots(1, 2), ("gold", "distinct_2"), strict=True):
        for method, color in COLOR.items():
            here = [row for row in rows if row["method"] == method and row["setting"] != "1,000 comparisons"
                    and row["setting"] != "5,000 comparisons"]  # fmt: skip
            if method == "best-of-n" and key == "gold" and here:
                axis.plot(*curve(here, key), color=color, linestyle="--", marker="o", markersize=4, label=method)
            ends = [[row for row in here if row["setting"] == setting and row["point"] == "end"]
                    for setting in dict.fromkeys(row["setting"] for row in here)]  # fmt: skip
            means = sorted((np.sqrt(max(np.mean([row["kl"] for row in end]), 0)), np.mean([row[key] for row in end]))
                           for end in ends if end)  # fmt: skip
            if means:
                axis.plot(*zip(*means, strict=True), color=color, marker="o", label=method)
                for row in (row for end in ends for row in end):
                    axis.plot(np.sqrt(max(row["kl"], 0)), row[key], ".", color=color, alpha=0.4)
        title = {"gold": "gold, deviations of the SFT model's texts"}.get(key, "variety (distinct-2)")
        axis.set(xlabel="√KL from the SFT model, nats a text", title=title)
        axis.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=9, frameon=False)
    figure.savefig(FIGURES["frontier"], dpi=110)

    figure = Figure(figsize=(15, 5), layout="constrained")
    ppo, best, accuracy = figure.subplots(1, 3)
    for axis, kind in ((ppo, "PPO"), (best, "best-of-n")):
        for color, count in zip(COLORS, COUNTS, strict=False):
            names = {
                "PPO": (f"PPO, {count} comparisons", LOW_PRICE),
                "best-of-n": ("best-of-n", f"{count} comparisons"),
            }
            here = [row for row in rows if (row["method"], row["setting"]) == names[kind]]
            if here:
                axis.plot(*curve(here, "reward"), color=color, linestyle="--")
                axis.plot(*curve(here, "gold"), color=color, label=f"{count} comparisons")
        axis.set(xlabel="√KL from the SFT model", title=f"{kind}: gold (solid), reward model (dashed)")
        axis.grid(alpha=0.25)
    best.sharey(ppo)
    for key, label, style in (("reward_accuracy_gold", "as gold orders them", "o-"),
                              ("reward_accuracy", "as their labels say", "s--")):  # fmt: skip
        found = {count: accuracies(rows, count, key) for count in COUNTS}
        sizes = [int(count.replace(",", "")) for count in COUNTS if found[count]]
        if sizes:
            accuracy.plot(sizes, [np.mean(x) for x in found.values() if x], style, color=COLORS[4], label=label)
            for size, values in zip(sizes, (x for x in found.values() if x), strict=True):
                accuracy.plot([size] * len(values), values, ".", color=COLORS[4], alpha=0.4)
            accuracy.legend(frameon=False)
    accuracy.set(xscale="log", xlabel="comparisons", title="reward model: share of held-out pairs ordered")
    accuracy.set_xticks([1000, 5000, 20000], ["1,000", "5,000", "20,000"], minor=False)
    accuracy.minorticks_off()
    accuracy.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3, frameon=False)
    figure.savefig(FIGURES["overoptimisation"], dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    header = [
        "method",
        "setting",
        "seeds",
        "gold, mean [worst, best]",
        "reward model",
        "KL, nats",
        "distinct-2",
        "length",
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
        for point in ("64", "1024") if method == "best-of-n" else ("end",):
            here = [row for row in rows if (row["method"], row["setting"], row["point"]) == (method, setting, point)]
            if not here:
                continue
            gold = [row["gold"] for row in here]
            means = [np.mean([row[key] for row in here]) for key in ("reward", "kl", "distinct_2", "length")]
            name = f"{setting}, n = {point}" if method == "best-of-n" else setting
            cells = [method, name, str(len(here)), f"{np.mean(gold):.2f} [{min(gold):.2f}, {max(gold):.2f}]"]
            cells += ["" if np.isnan(x) else f"{x:.2f}" for x in means]
            lines.append("| " + " | ".join(cells) + " |")
    judges = ["| comparisons | " + " | ".join(COUNTS) + " |", "| --- |" + " --- |" * len(COUNTS)]
    for key, name in (("reward_accuracy_gold", "as gold orders them"), ("reward_accuracy", "as their labels say")):
        found = [accuracies(rows, count, key) for count in COUNTS]
        cells = [f"{np.mean(x):.3f} [{min(x):.3f}, {max(x):.3f}]" if x else "" for x in found]
        judges.append(f"| held-out pairs {name} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *fold(lines, "All methods"),
            "",
            *judges,
            "",
            f"Seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}.",
        ]
    )


def publish() -> None:
    rows = read()
    if not rows:
        return
    draw(rows)
    section = """## Preferences: what a nat of KL buys

From the same SFT model and the same comparisons: how much better do PPO, DPO and its family write at which distance
from where they started, how does that compare with taking the best of n samples, and where does it turn?

    python benchmarks/frontier.py

![What a nat of KL buys](benchmarks/figures/frontier.png)

![Over-optimisation](benchmarks/figures/overoptimisation.png)"""
    page = PAGE.read_text(encoding="utf-8")
    write_whole(PAGE, replace_between(page, "results:frontier", table(rows), section).encode())
    print(f"{PAGE.name}, {', '.join(path.name for path in FIGURES.values())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--only", default="", help="only methods whose name and setting contain this")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "frontier", help="folder of each seed's models")
    parser.add_argument("--draw-only", action="store_true")
    args = parser.parse_args()
    if not args.draw_only:
        args.work.mkdir(parents=True, exist_ok=True)
        measure(args.seeds, args.only, args.work)
    publish()


if __name__ == "__main__":
    main()
