"""The first table and figure of benchmarks.md, from the studies' results.

    python benchmarks/overview.py          runs nothing; rewrites the page between its markers

Each line names the study that its numbers come from; a number that was not measured is left open.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from figure import COLORS, bootstrap, reward_threshold, seed_curves, value_of, values_of
from run import HOME, PAGE, collect, number, replace_between, write_whole
from studies import A2C, CART, DQN, LANDER, PPO, REINFORCE, STUDIES, Variant

Record = dict[str, Any]
LEARNERS = (("A2C + GAE", A2C), ("DQN", DQN), ("PPO", PPO), ("REINFORCE", REINFORCE))  # colours as in scores.png
RIVAL_OF = {A2C: "Stable-Baselines3 A2C", DQN: "Stable-Baselines3 DQN", PPO: "Stable-Baselines3 PPO"}


def records_of(study: str, script: str, env: str, label: str | None = None) -> list[Record]:
    """All runs of a script on an environment in a study; label where the study has several such variants."""
    found: dict[Variant, list[Record]] = collect(STUDIES[study])
    return [
        record
        for variant, records in found.items()
        if (variant.script, variant.env) == (script, env) and label in (None, variant.label)
        for record in records
    ]


def rival(script: str, env: str) -> list[Record]:
    """The runs of Stable-Baselines3's counterpart; none where it has none."""
    return records_of("against_others", "benchmarks/peers.py", env, RIVAL_OF.get(script, "none"))


def score(records: list[Record]) -> str:
    """Mean and worst seed of the greedy return at the end of training."""
    values = values_of(records, "eval_return_mean")
    return f"{number(values.mean())} (worst of {len(values)}: {number(values.min())})" if len(values) else "–"


def seconds(records: list[Record]) -> str:
    """Median seconds to the threshold over all seeds; a seed that never got there took forever."""
    values = [value_of(record, "solved_seconds") or np.inf for record in records if not record["error"]]
    if not values:
        return "–"
    reached = int(np.isfinite(values).sum())
    middle = np.median(values)
    text = f"{middle:.2g}" if middle < 10 else f"{middle:.0f}" if np.isfinite(middle) else "not reached"
    return text if reached == len(values) else f"{text} ({reached} of {len(values)} seeds)"


def overview_table() -> str:
    """One line a script and environment; Stable-Baselines3's columns once it has been run."""
    rivals = {script: label for script, label in RIVAL_OF.items() for env in (CART, LANDER) if rival(script, env)}
    header = ["task", "algorithm", "command", "score at the end", "seconds to the threshold"]
    header += ["Stable-Baselines3: score", "seconds"] if rivals else []
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for env in (CART, LANDER):
        for label, script in LEARNERS:
            ours, theirs = records_of("scores", script, env), rival(script, env)
            cells = [f"{env}, threshold {reward_threshold(env):g}", label, f"`python {script} --env {env}`"]
            cells += [score(ours), seconds(ours)] + ([score(theirs), seconds(theirs)] if rivals else [])
            lines += ["| " + " | ".join(cells) + " |"] if ours else []
    return "\n".join(lines)


def draw_overview() -> None:
    """Return against seconds on CartPole and LunarLander: ours whole lines, Stable-Baselines3 broken ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    handles: dict[str, Any] = {}
    for axis, env in zip(axes, (CART, LANDER), strict=True):
        for color, (label, script) in zip(COLORS, LEARNERS, strict=False):
            for records, style, name in ((records_of("scores", script, env), "-", label),
                                         (rival(script, env), "--", f"{label}, Stable-Baselines3")):  # fmt: skip
                grid, values = seed_curves(records, "charts/episodic_return", "seconds")
                if not len(grid):
                    continue
                (handles[name],) = axis.plot(grid, values.mean(0), style, color=color, linewidth=1.8)
                if len(values) > 1:
                    axis.fill_between(grid, *bootstrap(values), color=color, alpha=0.15, linewidth=0)
        axis.axhline(reward_threshold(env), color="#444444", linewidth=1, linestyle=":")
        axis.set(xscale="log", title=env, xlabel="seconds of training, one core")
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylim(bottom=-300)
    axes[0].set_ylabel("return, last 100 training episodes")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=4, frameon=False)
    figure.savefig(HOME / "figures" / "overview.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_overview()
    page = replace_between(PAGE.read_text(encoding="utf-8"), "overview", overview_table(), "## In one minute")
    write_whole(PAGE, page.encode())
