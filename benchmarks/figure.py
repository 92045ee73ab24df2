"""Statistics over seeds, and the figure of a study. run.py imports this file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from studies import Group, Panel, Study, Variant

COLORS = ("#2a6f97", "#d1495b", "#3a7d44", "#e09f3e", "#7b5ea7", "#17a2a2", "#8d6b4f", "#6c757d", "#e377a2", "#1b1b1e")
Record = dict[str, Any]  # one run: what its JSON file says, and "metrics", its columns as arrays

# 1. Statistics ----------------------------------------------------------------------------------


def bootstrap(values: np.ndarray, draws: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the 95 % percentile interval of the mean over the first axis (the seeds)."""
    count = len(values)
    picks = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=draws)  # [draws, seeds]
    low, high = np.percentile(picks @ values / count, [2.5, 97.5], axis=0)
    return low, high


def interquartile_mean(scores: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """Mean of the middle half of scores [seeds, tasks], and its 95 % interval, seeds resampled task by task.

    Agarwal et al. 2021, Deep RL at the Edge of the Statistical Precipice, arXiv 2108.13264.
    """
    seeds, tasks = scores.shape
    picks = np.random.default_rng(0).integers(seeds, size=(draws, seeds, tasks))
    samples = np.concatenate([scores[None], scores[picks, np.arange(tasks)]])  # [1 + draws, seeds, tasks]
    middle = np.sort(samples.reshape(1 + draws, -1))[:, scores.size // 4 : scores.size - scores.size // 4].mean(1)
    low, high = np.percentile(middle[1:], [2.5, 97.5])
    return float(middle[0]), float(low), float(high)


MARKS = {"Pendulum-v1": -200.0}  # where an environment has no threshold of its own


def reward_threshold(env: str | None) -> float | None:
    import gymnasium

    try:
        threshold = gymnasium.spec(env).reward_threshold if env else None
    except gymnasium.error.Error:
        return None
    return MARKS.get(env) if threshold is None else threshold


def first_reached(metrics: dict[str, np.ndarray], threshold: float) -> dict[str, float]:
    """Step and seconds at the first row whose mean of the last 100 episodes is at least this; empty if none is."""
    rows = np.flatnonzero(metrics["charts/episodic_return"] >= threshold)
    return {f"solved_{key}": float(metrics[key][rows[0]]) for key in ("step", "seconds") if len(rows)}


def value_of(record: Record, key: str) -> float | None:
    """A number of one run: a metric's column (over its last tenth, its "<column> max", or "<column> step", the
    median difference of neighbouring rows), or a dotted key."""
    column, _, how = key.partition(" ")
    if "/" in column or how:
        values = record["metrics"].get(column, np.array([]))
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        if how == "step":
            return float(np.median(np.diff(values))) if len(values) > 1 else None
        return float(values.max() if how == "max" else values[-max(len(values) // 10, 1) :].mean())
    value: Any = record["summary"] | {k: record[k] for k in ("wall_seconds", "peak_memory_mb")}
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return None if value is None else float(value)


def values_of(records: Sequence[Record], key: str) -> np.ndarray:
    values = [value_of(record, key) for record in records if not record["error"]]
    return np.array([value for value in values if value is not None])


# 2. The figure ----------------------------------------------------------------------------------


def seed_curves(records: Sequence[Record], key: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric of all whole runs on one grid: x [G], values [seeds, G]; the grid is where all runs have values.

    Seconds are spaced evenly on a logarithmic axis, steps on a linear one.
    """
    pairs = []
    for record in records:
        xs, ys = record["metrics"].get(x), record["metrics"].get(key)
        if record["error"] or xs is None or ys is None or np.isfinite(ys).sum() < 2:
            continue
        pairs.append((xs[np.isfinite(ys)], ys[np.isfinite(ys)]))
    start, end = max((xs[0] for xs, _ in pairs), default=0), min((xs[-1] for xs, _ in pairs), default=0)
    if start >= end:
        return np.array([]), np.empty((0, 0))
    grid = np.geomspace(start, end, 200) if x == "seconds" and start > 0 else np.linspace(start, end, 200)
    return grid, np.array([np.interp(grid, xs, ys) for xs, ys in pairs])


def draw_panel(axis: Any, group: Group, panel: Panel, found: dict[Variant, list[Record]], look: Callable) -> bool:
    """One panel; says whether there was anything to draw."""
    import matplotlib as mpl

    axis.set_title(panel.title, fontsize=10.5)
    points = [(v.x, values_of(found[v], panel.key)) for v in group.variants] if panel.kind != "curves" else []
    points = [(x, values) for x, values in points if len(values)]
    if panel.kind == "heat":
        rows, columns = (sorted({variant.x[i] for variant in group.variants}) for i in (0, 1))
        image = np.full((len(rows), len(columns)), np.nan)
        for (row, column), values in points:
            image[rows.index(row), columns.index(column)] = values.mean()
        axis.imshow(image, cmap="viridis", aspect="auto", origin="lower")
        middle = np.nanmean([np.nanmin(image), np.nanmax(image)]) if points else 0
        for i, j in np.ndindex(image.shape):
            if np.isfinite(image[i, j]):
                axis.text(j, i, f"{image[i, j]:.3f}", ha="center", va="center", fontsize=9,
                          color="white" if image[i, j] < middle else "black")  # fmt: skip
        axis.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
        axis.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
        axis.set_xlabel("{1} (upwards: {0})".format(*panel.x.split(", ")))
        return bool(points)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.kind == "scaling":
        axis.set(xscale="log", yscale="log", xlabel=panel.x)
        if len(points) > 1:
            x, y = np.array([p[0] for p in points]), np.array([np.median(p[1]) for p in points])
            spread = np.abs(np.array([[p[1].min(), p[1].max()] for p in points]).T - y)
            axis.errorbar(x, y, spread, color=COLORS[0], marker="o", capsize=3, linewidth=1.8)
            slope, offset = np.polyfit(np.log(x), np.log(y), 1)
            axis.plot(x, np.exp(offset) * x**slope, color=COLORS[1], linestyle="--", linewidth=1.2,
                      label=f"slope {slope:+.2f}")  # fmt: skip
            axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9)
            axis.set_xticks(x, [f"{value:g}" for value in x], minor=False)
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            ticks = (1, 2, 5) if y.max() > 5 * y.min() else range(1, 10)
            axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=ticks))
        return bool(points)
    if panel.bottom is not None:
        axis.set_ylim(bottom=panel.bottom)
    if panel.linear_to is not None:
        axis.axhline(0, color="#444444", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=panel.linear_to)
    drawn = False
    for variant in group.variants:
        grid, curves = seed_curves(found[variant], panel.key, panel.x)
        if not len(grid):
            continue
        drawn = True
        (line,) = axis.plot(grid, curves.mean(0), **look(variant), linewidth=1.8, label=variant.label)
        if len(curves) > 1:
            axis.fill_between(grid, *bootstrap(curves), color=line.get_color(), alpha=0.18, linewidth=0)
    envs = {variant.env for variant in group.variants}
    goal = reward_threshold(envs.pop()) if len(envs) == 1 and "return" in panel.key else None
    if goal is not None and drawn:
        axis.axhline(goal, color="#444444", linewidth=1, linestyle="--", label="threshold")
    axis.set_xlabel({"step": "environment steps", "charts/episodes": "texts written during PPO"}.get(panel.x, panel.x))
    axis.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
    if panel.x == "seconds":
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    return drawn


def draw(study: Study, found: dict[Variant, list[Record]], file: Path) -> None:
    """One picture: a row per group with its legend on the right; or, where every group has one panel
    with the same few labels, panels side by side with one legend below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def measured(group: Group) -> bool:
        """Dynamic programming has no training return: a group of such runs alone is left out."""
        records = [record for variant in group.variants for record in found[variant]]
        shown = group.panels or study.panels
        return any(panel.kind != "curves" or panel.key in r["metrics"] for panel in shown for r in records)

    groups = [group for group in study.groups if measured(group)]
    labels = list(dict.fromkeys(variant.label for group in groups for variant in group.variants))
    panels = [list(group.panels or study.panels) for group in groups]
    if not groups:
        return
    mosaic = all(len(row) == 1 for row in panels) and len(groups) > 2 and len(labels) <= len(COLORS)
    columns = min(3, len(groups)) if mosaic else max(map(len, panels))
    rows = -(-len(groups) // columns) if mosaic else len(groups)
    size = (4.3 * columns + (0 if mosaic else 2.4), 3.1 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
    handles: dict[str, Any] = {}
    counterpart = {theirs: ours for ours, theirs in study.ratios}
    for number, (group, row) in enumerate(zip(groups, panels, strict=True)):
        names = [variant.label for variant in group.variants if variant not in counterpart]

        def look(variant: Variant, group: Group = group, names: list[str] = names) -> dict[str, Any]:
            if group.ordered:
                return {"color": plt.get_cmap("viridis")(0.92 * names.index(variant.label) / max(len(names) - 1, 1))}
            ours = counterpart.get(variant, variant)  # the other of a pair has its colour, dashed
            place = (labels if mosaic else names).index(ours.label) % len(COLORS)
            return {"color": COLORS[place], "linestyle": "-" if ours is variant else "--"}

        handles = handles if mosaic else {}
        line = [axes.flat[number]] if mosaic else list(axes[number])
        for axis, panel in zip(line, row, strict=False):
            if not draw_panel(axis, group, panel, found, look):
                axis.text(0.5, 0.5, "no such curve", ha="center", transform=axis.transAxes, color="#777777")
            entries = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
            handles |= entries
            if mosaic:
                axis.set_title(group.title, fontsize=10.5)
        for axis in line[len(row) :]:
            axis.set_visible(False)
        if not mosaic:
            line[0].set_ylabel(group.title, fontsize=10.5, fontweight="bold", labelpad=9)
            if panels[number][0].kind == "curves":
                line[len(row) - 1].legend(handles.values(), handles.keys(), frameon=False, loc="center left",
                                          bbox_to_anchor=(1.02, 0.5), fontsize=9)  # fmt: skip
    if mosaic:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=6, frameon=False)
        for axis in list(axes.flat)[len(groups) :]:
            axis.set_visible(False)
    figure.suptitle(study.title + (f": {study.panels[0].title}" if mosaic else ""), fontsize=12)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name("." + file.name)
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, file)
    plt.close(figure)
