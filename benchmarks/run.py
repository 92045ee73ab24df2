"""Runs the studies behind benchmarks.md, draws their figures and writes their tables.

    python benchmarks/run.py                          lists the studies, and how many results are out of date
    python benchmarks/run.py scores                   runs one: ten seeds of every variant, two at a time
    python benchmarks/run.py scores --only lunar --seeds 3 --workers 1
    python benchmarks/run.py scores --draw-only       draws it again from the results that are there

Every variant and seed is one process of the script, started as a user starts it, on a core of its own
where the system allows. Its metrics and summary are kept in results/<study>/. A run is done when both of
its files read back whole and belong to the command that is asked for now; everything else is run again,
so an interrupted study goes on where it stopped when the same command is given once more.
"""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from figure import MARKS, bootstrap, draw, first_reached, interquartile_mean, reward_threshold, value_of, values_of
from studies import ROOT, SEED, STUDIES, Study, Variant

HOME = ROOT / "benchmarks"  # results/ and figures/ lie here
PAGE = ROOT / "benchmarks.md"
Record = dict[str, Any]

# 1. Results -------------------------------------------------------------------------------------


def command_of(variant: Variant, seed: int) -> str:
    env = f" --env {variant.env}" if variant.env else ""
    return f"python {variant.script}{env} --seed {seed} {variant.flags}".strip()


def files_of(study: Study, variant: Variant, seed: int) -> tuple[Path, Path]:
    stem = HOME / "results" / (variant.home or study.name) / f"{variant.name}__seed{seed}"
    return stem.with_name(stem.name + ".csv.gz"), stem.with_name(stem.name + ".json")


def load_script(script: str) -> Any:
    """A script of algos/ or rlhf/ as a module, loaded once."""
    name = Path(script).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def code_digest(script: Path) -> str:
    """What a script computes, as a number: sections 2 to 6 where it has them, without comments and docstrings."""
    source = script.read_text(encoding="utf-8")
    if "\n# 7. " in source:
        source = source[source.index("\n# 2. ") : source.index("\n# 7. ")]
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body.pop(0)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def out_of_date(records: dict[Variant, list[Record]]) -> int:
    """How many results are of a script that has changed since, as far as the results know."""
    return sum(
        record.get("code_sha256") != code_digest(ROOT / variant.script)
        for variant, found in records.items()
        for record in found
    )


def write_whole(path: Path, content: bytes) -> None:
    """The file appears with all of its content or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def pack(metrics: str) -> bytes:
    """metrics.csv, numbers cut to five digits, compressed; the same bytes for the same metrics."""

    def short(cell: str) -> str:
        try:
            return cell if len(cell) < 8 else f"{float(cell):.5g}" if "." in cell or "e" in cell else cell
        except ValueError:
            return cell

    rows = [[short(cell) for cell in row] for row in csv.reader(io.StringIO(metrics))]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return gzip.compress(out.getvalue().encode(), mtime=0)


def changed_settings(variant: Variant, record: Record) -> list[str]:
    """Settings of a finished run that the script's defaults and presets no longer give."""
    if not variant.script.startswith("algos/") or not record.get("settings"):  # a failed run has none
        return []
    script, then = load_script(variant.script), record["settings"]
    now = dataclasses.asdict(script.Args()) | script.PRESETS.get(then["env"], {})
    flags = re.findall(r" --(?:no-)?([a-z0-9-]+)", record["command"])
    same = {"run_dir", "seed", "device", *(flag.replace("-", "_") for flag in flags)}
    return [k for k, value in now.items() if k not in same and json.dumps(then.get(k, value)) != json.dumps(value)]


def read_back(study: Study, variant: Variant, seed: int) -> tuple[Record | None, str]:
    """The record of a finished run, its metrics included; or None and what is wrong with the files."""
    csv_file, json_file = files_of(study, variant, seed)
    if not csv_file.exists() and not json_file.exists():
        return None, ""
    try:
        packed = csv_file.read_bytes()
        record = json.loads(json_file.read_text(encoding="utf-8"))
        if record["metrics_sha256"] != hashlib.sha256(packed).hexdigest():
            return None, "its two files do not belong together"
        rows = list(csv.DictReader(io.StringIO(gzip.decompress(packed).decode())))
        if record["command"] != command_of(variant, seed):
            return None, "was run with other flags"
        if other := changed_settings(variant, record):
            return None, f"was run with other settings: {', '.join(other)}"
    except FileNotFoundError:
        return None, "is half finished"
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        return None, f"is damaged ({type(error).__name__})"
    names = rows[0] if rows else {}
    record["metrics"] = {k: np.array([float(row[k]) if row[k] else np.nan for row in rows]) for k in names}
    if variant.env in MARKS and rows:
        record["summary"] |= first_reached(record["metrics"], MARKS[variant.env])
    return record, ""


def collect(study: Study) -> dict[Variant, list[Record]]:
    """Every whole result of the study, whatever its seed."""
    found: dict[Variant, list[Record]] = {}
    for variant in study.variants:
        seeds = []
        for file in files_of(study, variant, 0)[0].parent.glob("*.json"):
            if match := re.fullmatch(re.escape(variant.name) + r"__seed(\d+)\.json", file.name):
                seeds.append(int(match[1]))
        records = [read_back(study, variant, seed)[0] for seed in sorted(seeds)]
        found[variant] = [record for record in records if record]
    return found


# 2. Running -------------------------------------------------------------------------------------


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def here(settings: Record) -> Record:
    """The settings with paths into the repository as seen from it: a result names no folder of its machine."""
    inside, kept = str(ROOT) + os.sep, {k: v for k, v in settings.items() if k != "run_dir"}
    return {k: v.removeprefix(inside) if isinstance(v, str) else v for k, v in kept.items()}


class Run:
    """One process: a variant with a seed, from its start until its two files are written."""

    def __init__(self, study: Study, variant: Variant, seed: int, core: int | None, peers_python: str):
        self.study, self.variant, self.seed, self.core = study, variant, seed, core
        self.temporary = tempfile.TemporaryDirectory(prefix="plainrl-")
        self.folder = Path(self.temporary.name)
        python = peers_python if variant.script.endswith("peers.py") else sys.executable
        command = [python, *shlex.split(command_of(variant, seed))[1:], "--run-dir", str(self.folder / "runs")]
        self.output = (self.folder / "output").open("wb")
        pin: Callable[[], None] | None = None if core is None else lambda: os.sched_setaffinity(0, {core})
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT, preexec_fn=pin,
            env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.memory: float | None = None
        self.stopped = ""

    def ended(self) -> bool:
        if time.perf_counter() - self.started > self.study.limit and not self.stopped:
            self.stopped = f"stopped after {self.study.limit:g} s"
            self.process.kill()
        if not hasattr(os, "wait4"):
            return self.process.poll() is not None
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid:
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.memory = round(usage.ru_maxrss / (1 if sys.platform != "darwin" else 1024) / 1024, 1)
        return bool(pid)

    def stop(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        self.output.close()
        self.temporary.cleanup()

    def keep(self) -> Record:
        """Writes the result, or the miss, to its place."""
        wall = time.perf_counter() - self.started
        folder = next((self.folder / "runs").glob("*/"), self.folder)

        def text(name: str) -> str:
            return (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""

        printed = (self.folder / "output").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(printed) if line.strip()), "printed nothing")
        summary, config = json.loads(text("summary.json") or "{}"), json.loads(text("config.json") or "{}")
        failed = self.process.returncode != 0 or not summary
        versions = {k: v for k, v in config.items() if isinstance(v, str) and k not in ("script", "device", "platform")}
        packed = pack(text("metrics.csv"))
        record = {
            "study": self.study.name, "variant": self.variant.name, "label": self.variant.label, "seed": self.seed,
            "command": command_of(self.variant, self.seed),
            "error": (self.stopped or last.replace(str(self.folder), "")) if failed else None,
            "wall_seconds": round(wall, 3), "peak_memory_mb": self.memory, "summary": summary,
            "device": config.get("device"), "settings": here(config.get("args", {})), "versions": versions,
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.system()},
            "pinned": self.core is not None, "metrics_sha256": hashlib.sha256(packed).hexdigest(),
            "code_sha256": code_digest(ROOT / self.variant.script),
        }  # fmt: skip
        for variant, name in self.study.pictures:
            if variant == self.variant and self.seed == SEED and (folder / name).is_file():
                write_whole(HOME / "figures" / f"{self.study.name}_{name}", (folder / name).read_bytes())
        csv_file, json_file = files_of(self.study, self.variant, self.seed)
        write_whole(csv_file, packed)
        write_whole(json_file, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
        return record


def clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def run_study(
    study: Study, seeds: int, workers: int, only: str, again: bool, first: int, peers_python: str
) -> None:  # fmt: skip
    """Runs what is not there yet. All variants with one seed come before the next seed, so that a drift of
    the machine's speed meets all of them alike."""
    jobs, walls, overall = [], {}, []
    for seed in range(first, first + seeds):
        for variant in study.variants:
            if only.lower() not in f"{variant.name} {command_of(variant, seed)}".lower():
                continue
            record, problem = read_back(study, variant, seed)
            if problem:
                print(f"{variant.name} seed {seed} {problem}: run again")
            if record and not (record["error"] and again):
                walls.setdefault(variant, []).append(record["wall_seconds"])
            else:
                jobs.append((variant, seed))
    cores: list[int | None] = [None] * workers
    if hasattr(os, "sched_getaffinity"):
        own = sorted(os.sched_getaffinity(0))
        if workers > len(own):
            print(f"{len(own)} cores are free for this process: {len(own)} runs at a time, not {workers}")
        cores = list(own[:workers])
    total, done, running, began = len(jobs), 0, [], time.perf_counter()
    print(f"{study.name}: {total} runs to do, {sum(map(len, walls.values()))} are there; {len(cores)} at a time")
    try:
        while jobs or running:
            while jobs and cores:
                variant, seed = jobs.pop(0)
                running.append(Run(study, variant, seed, cores.pop(0), peers_python))
            time.sleep(0.02)
            for run in [run for run in running if run.ended()]:
                record = run.keep()
                running.remove(run)
                cores.append(run.core)
                run.stop()
                done += 1
                overall.append(record["wall_seconds"])
                walls.setdefault(run.variant, []).append(record["wall_seconds"])
                guess = statistics.mean(overall)
                left = sum(statistics.mean(walls.get(variant, [guess])) for variant, _ in jobs)
                left += sum(max(guess - (time.perf_counter() - other.started), 0) for other in running)
                result = f"MISS: {record['error']}" if record["error"] else short_result(record)
                print(f"[{done}/{total}] {run.variant.name} seed {run.seed}: {result}, {record['wall_seconds']:.1f} s"
                      f" · about {clock(left / (len(running) + len(cores)))} left", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted after {done} of {total} runs; the same command goes on from here") from None
    finally:
        for run in running:
            run.stop()
    print(f"{done} runs in {clock(time.perf_counter() - began)}")


def short_result(record: Record) -> str:
    mean = record["summary"].get("eval_return_mean")
    return "done" if mean is None else f"evaluation {mean:.4g}"


# 3. The table -----------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def interval(values: np.ndarray) -> str:
    if len(values) == 0:
        return "–"
    low, high = bootstrap(values)
    return number(values.mean()) + (f" [{number(low)}, {number(high)}]" if len(values) > 1 else "")


def table_row(study: Study, variant: Variant, records: list[Record]) -> list[str]:
    whole = [record for record in records if not record["error"]]
    cells = [variant.label, variant.env or "–", f"{len(whole)}/{len(records)}"]
    if not study.columns_only:
        steps, scores = values_of(records, "steps"), values_of(records, "eval_return_mean")
        goal, solved = reward_threshold(variant.env), values_of(records, "solved_seconds")
        reached = "–"
        if goal is not None:
            lost = sum(1 for r in whole if r["summary"].get("solved_step") and value_of(r, "eval_return_mean") < goal)
            reached = f"{len(solved)}/{len(records)}" + (f", {lost} lost" if lost else "")
        cells += [
            f"{number(np.median(steps))} steps" if len(steps) else "–",
            interval(scores),
            f"{number(scores.min())} / {number(scores.max())}" if len(scores) else "–",
            reached,
            f"{np.median(solved):.2f} ({solved.max():.2f})" if len(solved) else "–",
        ]
    cells += [f"{np.median(values):.1f}" if len(values := values_of(records, "wall_seconds")) else "–"]
    if not study.columns_only:
        cells += [number(np.median(values)) if len(values := values_of(records, "sps")) else "–"]
    cells += [interval(values_of(records, key)) for _, key in study.columns]
    return [*cells, variant.published or "–"] if any(v.published for v in study.variants) else cells


def ratio_lines(study: Study, found: dict[Variant, list[Record]]) -> list[str]:
    """How many times as fast the first of each pair is, seed by seed: geometric mean and range."""
    lines = []
    for one, other in study.ratios:
        parts = []
        for name, key, sign in (("steps per second", "sps", 1), ("seconds to the threshold", "solved_seconds", -1)):
            by_seed = [{r["seed"]: value_of(r, key) for r in found[v] if not r["error"]} for v in (one, other)]
            logs = [sign * np.log(by_seed[0][seed] / by_seed[1][seed])
                    for seed in by_seed[0] if by_seed[0][seed] and by_seed[1].get(seed)]  # fmt: skip
            if logs:
                low, middle, high = np.exp([min(logs), np.mean(logs), max(logs)])
                spread = f"{low:.1f} to {high:.1f}, {len(logs)} seeds" if len(logs) > 1 else "1 seed"
                parts.append(f"{name} {middle:.1f} × as good ({spread})")
        if parts:
            lines.append(f"- {one.label} over {other.label}, {one.env}: {'; '.join(parts)}")
    fold = "<details><summary>Seed by seed, where both got there</summary>"
    return [fold, "", *lines, "", "</details>"] if lines else []


def aggregate_lines(study: Study, found: dict[Variant, list[Record]]) -> list[str]:
    """The interquartile mean over seeds and tasks of every script that has been run on all of study.random."""
    scores: dict[str, list[np.ndarray]] = {}
    for env, chance in study.random.items():
        for variant, records in found.items():
            if variant.env == env and len(values := values_of(records, "eval_return_mean")):
                scores.setdefault(variant.label, []).append((values - chance) / (reward_threshold(env) - chance))
    lines = []
    for label, tasks in scores.items():
        if len(tasks) == len(study.random):
            seeds = min(map(len, tasks))
            middle, low, high = interquartile_mean(np.stack([task[:seeds] for task in tasks], axis=1))
            lines.append(f"- {label}: {middle:.3f} [{low:.3f}, {high:.3f}]")
    tasks = " and ".join([", ".join(list(study.random)[:-1]), *list(study.random)[-1:]])
    title = f"Interquartile mean over the seeds of {tasks}, 0 for random actions, 1 for the threshold:"
    return [title, "", *lines] if lines else []


def seeds_of(found: dict[Variant, list[Record]]) -> str:
    """Which seeds were run: most variants start at SEED, one tuned again after its first figures starts later."""
    seeds = {variant: [record["seed"] for record in records] for variant, records in found.items() if records}
    start = min(map(min, seeds.values()))
    usual = [seed for those in seeds.values() if min(those) < start + 100 for seed in those]
    parts = [f"Seeds {start} to {max(usual)}"]
    for variant, those in seeds.items():
        if min(those) >= start + 100:
            parts.append(f"{min(those)} to {max(those)} for {variant.label} ({variant.env})")
    return ", ".join(parts)


def fold(lines: list[str], title: str) -> list[str]:
    """A table of Markdown, below a fold where it has more than a dozen rows."""
    if len(lines) <= 14:
        return lines
    return [f"<details><summary>{title}, {len(lines) - 2} rows</summary>", "", *lines, "", "</details>"]


def table(study: Study, found: dict[Variant, list[Record]]) -> str:
    header = ["variant", "environment", "runs"]
    if not study.columns_only:
        header += ["budget", "evaluation, mean [95 %]", "worst / best seed", "reached the threshold",
                   "seconds to it, median (max)"]  # fmt: skip
    header += ["seconds, whole run"] + ([] if study.columns_only else ["steps per second"])
    header += [name for name, _ in study.columns]
    header += ["published"] if any(variant.published for variant in study.variants) else []
    shown = [v for v in study.variants if any(v in group.variants and group.in_table for group in study.groups)]
    rows = [table_row(study, variant, found[variant]) for variant in shown if found[variant]]
    if not any(found.values()):
        return "Not measured yet."
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    missing = [v.label + (f" ({v.env})" if v.env else "") for v in shown if not found[v]]
    misses = [f"- **Miss**: {v.label}{f' ({v.env})' if v.env else ''}, seed {record['seed']}: {record['error']}"
              for v, records in found.items() for record in records if record["error"]]  # fmt: skip
    notes = [f"{seeds_of(found)}; {sum(map(len, found.values()))} runs, one core each."]
    if missing:
        notes.append(f"Not measured yet: {', '.join(missing)}.")
    parts = [
        fold(lines, study.title),
        [" ".join(notes)],
        misses,
        aggregate_lines(study, found),
        ratio_lines(study, found),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def machine_lines() -> str:
    """The machines and versions that all results together come from."""
    machines: dict[str, int] = {}
    for file in sorted((HOME / "results").glob("*/*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
            machine = record["machine"]
            line = f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; {versions}"
        except (OSError, ValueError, KeyError):
            continue
        if record["versions"]:
            machines[line] = machines.get(line, 0) + 1
    ranked = sorted(machines.items(), key=lambda item: -item[1])
    return "\n".join(f"- {line}: {count} runs" for line, count in ranked) or "Not measured yet."


def replace_between(text: str, mark: str, content: str, otherwise: str) -> str:
    """text with new content between <!-- mark --> and <!-- /mark -->; without the marks, otherwise is appended."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if start not in text or end not in text:
        text = text.rstrip("\n") + f"\n\n{otherwise}\n\n{start}\n{end}\n"
    before, rest = text.split(start, 1)
    return f"{before}{start}\n{content}\n{end}{rest.split(end, 1)[1]}"


def publish(study: Study) -> None:
    """Draws the figure and rewrites the table; every other word of the page stays as it is."""
    found = collect(study)
    draw(study, found, HOME / "figures" / f"{study.name}.png")
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Benchmarks\n"
    page = replace_between(page, "machine", machine_lines(), "## Machine and versions")
    section = (f"## {study.title}\n\n{study.question}\n\n    python benchmarks/run.py {study.name}\n\n"
               f"![{study.title}](benchmarks/figures/{study.name}.png)")  # fmt: skip
    page = replace_between(page, f"results:{study.name}", table(study, found), section)
    write_whole(PAGE, page.encode())
    print(f"{PAGE.name}, benchmarks/figures/{study.name}.png")


# 4. Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=10, help=f"runs of each variant, from seed {SEED} on")
    parser.add_argument("--first-seed", type=int, default=SEED, help="seeds 1 to 10 were tuned on")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; 1 where seconds matter most")
    parser.add_argument("--only", default="", help="only variants whose name or command contains this")
    parser.add_argument("--again", action="store_true", help="try failed runs once more")
    parser.add_argument("--draw-only", action="store_true", help="run nothing; draw from the results that are there")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter with benchmarks/requirements.txt")
    args = parser.parse_args(argv)
    if args.study is None:
        for study in STUDIES.values():
            found = collect(study)
            there = f"{sum(map(len, found.values())):4} runs there, {out_of_date(found):4} out of date"
            print(f"{study.name:16} {len(study.variants):3} variants, {there}   {study.question}")
        return
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    study = STUDIES[args.study]
    if not args.draw_only:
        run_study(study, args.seeds, args.workers, args.only, args.again, args.first_seed, args.peers_python)
    publish(study)


if __name__ == "__main__":
    main()
