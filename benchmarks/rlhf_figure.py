"""The README's picture of RLHF: curves and samples of one run of rlhf_ppo.py.

    python benchmarks/rlhf_figure.py runs/<folder>

The samples are the first prompts of the run's samples.md, not chosen ones.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).resolve().parent / "figures" / "rlhf_samples.png"
BEFORE, AFTER = "#6c757d", "#2a6f97"
PANELS = {"eval/judge": "second judge: P(positive)", "eval/kl": "KL from the SFT model, nats a text",
          "eval/distinct_2": "distinct-2 (variety)", "eval/length": "length, tokens"}  # fmt: skip


def samples(folder: Path) -> list[tuple[str, str, str]]:
    """Prompt, continuation before and continuation after, in the order of samples.md."""
    pattern = r"\*\*(.*)\*\*\n- before: (.*)\n- after: (.*)"
    return re.findall(pattern, (folder / "samples.md").read_text())


def draw(folder: Path, picture: Path = PICTURE, count: int = 6) -> None:
    rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["eval/kl"]]
    summary = json.loads((folder / "summary.json").read_text())
    figure = plt.figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    for axis, (key, title) in zip(left.subplots(2, 2).flat, PANELS.items(), strict=True):
        before = summary["before"][key.removeprefix("eval/")]
        points = [(0, before)] + [(float(row["charts/episodes"]), float(row[key])) for row in rows if row[key]]
        axis.plot(*zip(*points, strict=True), color=AFTER, linewidth=1.8)
        axis.axhline(before, color=BEFORE, linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, 1.1 * max(value for _, value in points))
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    left.supxlabel("texts written during PPO", fontsize=10)

    axis = right.subplots()
    axis.set_axis_off()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    y = 1.0
    for prompt, before, after in samples(folder)[:count]:
        for name, text, color in (("before", before, BEFORE), ("after", after, AFTER)):
            lines = textwrap.wrap(f"{prompt} {text}".replace(" ,", ","), 68)[:3]
            axis.text(0, y, name, color=color, fontsize=9, va="top", weight="bold")
            axis.text(0.1, y, "\n".join(lines), color=color, fontsize=11, va="top")
            y -= 0.049 * len(lines) + 0.012
        y -= 0.025
    figure.suptitle(f"RLHF: the same prompts before and after PPO (seed {summary['seed']})", fontsize=12)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "samples.md").is_file():
        sys.exit("usage: python benchmarks/rlhf_figure.py runs/<folder of a finished run of rlhf_ppo.py>")
    draw(Path(sys.argv[1]))
    print(PICTURE)
