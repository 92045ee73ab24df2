"""What every script promises, tested on all of them: run folder, flags, resuming, endings, bad input."""

import ast
import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import matplotlib.image
import pytest
import torch
from conftest import DEFAULT_TINY, ROOT, SCRIPTS, TINY, each_script, load_script, run_script, tiny

# Flags for a run that goes on until it is stopped.
DEFAULT_ENDLESS = "--total-timesteps 100000000"
ENDLESS = {
    "algos/dqn.py": "--total-timesteps 2000000",  # it reports every 200th of a run, as do the next three
    "algos/sac.py": "--total-timesteps 100000",
    "algos/td3.py": "--total-timesteps 100000",
    "algos/dqn_atari.py": "--total-timesteps 20000",
    "algos/dynamic_programming.py": "--env FrozenLake-v1 --map-size 20 --gamma 0.99999 --tolerance 1e-300"
    " --total-timesteps 1000000",
    "rlhf/grpo.py": "--total-episodes 1000000",
    "rlhf/dpo.py": "--total-episodes 1000000",
    "rlhf/pretrain.py": "--total-episodes 100000000",
    "rlhf/rlhf_ppo.py": "--total-episodes 1000000",
}

# Flags that make the loss overflow; None where the updates are averages and cannot.
DEFAULT_EXPLODE = "--learning-rate 1e37"  # Adam divides it by 0.1 in its first step: still a float32
EXPLODE = {
    "algos/dynamic_programming.py": None,
    "algos/q_learning.py": None,
    "algos/reinforce.py": "--learning-rate 1e37 --baseline value",  # its policy loss is 0 once it is certain
    "rlhf/grpo.py": "--learning-rate 1e37 --ent-coef 0.01",  # without a bonus equal rewards have no gradient
}

# Functions that are the same text wherever they occur. The run record is checked as a whole.
SHARED_FUNCTIONS = {"gae": ("algos/ppo.py", "algos/a2c_gae.py", "algos/ppo_masks.py", "algos/ppo_lstm.py")}

# The scripts of language models define one thing under one name, bar what makes each what it is.
LANGUAGE_SCRIPTS = ("rlhf/rlhf_ppo.py", "rlhf/dpo.py", "rlhf/grpo.py", "rlhf/pretrain.py")
THEIR_OWN = {
    "rlhf/rlhf_ppo.py": set(),
    "rlhf/dpo.py": {"try_once", "summarize"},
    "rlhf/grpo.py": {
        "load_rows",
        "token_logprobs",
        "score",
        "load_reward",
        "rollout",
        "summarize",
        "update",
        "evaluate",
    },
    "rlhf/pretrain.py": {"encode", "sample", "distinct_2", "evaluate"},
}
OF_TWO = {"encode", "load_lm", "load_rows", "token_logprobs", "sample", "evaluate", "distinct_2", "save_pretrained",
          "score", "as_texts", "unusable", "write", "trainable", "own_parts", "take_step", "Trained"}  # fmt: skip

RUN_RECORD = "# 7. Run record"
CLOCK = ("seconds", "charts/SPS")


def source(script: str) -> str:
    return (ROOT / script).read_text()


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv; every one must have a value or nothing for every column."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(None not in row and None not in row.values() for row in rows)
    return rows


def metrics_of(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the columns that a clock writes."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows_of(folder)]


def checkpoint_of(folder: Path) -> dict:
    """model.pt; its record is the part that says how far the run was."""
    saved = torch.load(folder / "model.pt", weights_only=True)
    return {"record": saved} | saved


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def budget(script: str, factor: int) -> tuple[str, str]:
    """The flag that bounds a run, and factor times its value in a tiny run."""
    flags = tiny(script)
    name = next(flag for flag in ("--total-timesteps", "--total-episodes", "--epochs") if flag in flags)
    return name, str(factor * int(flags[flags.index(name) + 1]))


def environment(**variables: str) -> dict[str, str]:
    """This process's environment variables without Python's search path and Weights & Biases' settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "WANDB", "COV", "PYTEST"))}
    return kept | {"OMP_NUM_THREADS": "1", **variables}


def command(script: str, *flags: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def data_flags(script: str) -> list[str]:
    """Where the data lies that the script has beside it and a copy of it has not."""
    if not script.startswith("rlhf/"):
        return []
    args = load_script(script).Args()
    return [flag for name in ("model", "dataset", "gold") if hasattr(args, name)
            for flag in (f"--{name}", getattr(args, name))]  # fmt: skip


# The text of the scripts -----------------------------------------------------------------------------


@each_script
def test_sections_come_in_one_order(script):
    numbers = re.findall(r"^# (\d)\. \S", source(script), re.M)
    assert numbers == list("12345678")
    titles = dict(re.findall(r"^# (\d)\. ([A-Za-z ]+?) -+$", source(script), re.M))
    assert titles["2"] in ("Environment", "Data")  # the rlhf scripts have a data set
    del titles["2"]
    assert list(titles.values()) == [
        "Settings", "Model", "The mathematics", "Training", "Evaluation", "Run record", "Command line",
    ]  # fmt: skip


@each_script
def test_header_opens_the_file(script):
    assert source(script).startswith("# /// script\n")
    header = ast.get_docstring(ast.parse(source(script)))
    assert f"python {script}" in header
    for part in ("(Papers|Books)", "Run", "Expect"):
        assert re.search(rf"^{part} ", header, re.M), part
    assert re.search(r"^Deviations\b.*\n 1\. ", header, re.M)


@each_script
def test_run_record_is_the_same_text_everywhere(script):
    assert source(script).count(RUN_RECORD) == 1
    assert source(script).partition(RUN_RECORD)[2] == source("algos/ppo.py").partition(RUN_RECORD)[2]


@pytest.mark.parametrize("name", SHARED_FUNCTIONS)
def test_shared_function_is_the_same_text(name):
    texts = set()
    for script in SHARED_FUNCTIONS[name]:
        function = next(
            n for n in ast.walk(ast.parse(source(script))) if isinstance(n, ast.FunctionDef) and n.name == name
        )
        texts.add(ast.get_source_segment(source(script), function))
    assert len(texts) == 1


def definitions(script: str) -> dict[str, list[str]]:
    """The lines of every function and class of a script, decorators included."""
    lines = source(script).splitlines()
    nodes = [n for n in ast.parse(source(script)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    first = {n.name: min(part.lineno for part in (n, *n.decorator_list)) - 1 for n in nodes}
    return {n.name: lines[first[n.name] : n.end_lineno] for n in nodes}


def test_scripts_of_language_models_share_what_they_do_alike():
    of = {script: definitions(script) for script in LANGUAGE_SCRIPTS}
    preference, dpo = of["rlhf/rlhf_ppo.py"], of["rlhf/dpo.py"]
    assert set(preference) & set(dpo) >= OF_TWO
    assert all("load_split" in of[script] for script in LANGUAGE_SCRIPTS)
    for script in LANGUAGE_SCRIPTS:
        for name in set(of[script]) & set(preference) - {"Args", "train"} - THEIR_OWN[script]:
            assert of[script][name] == preference[name], f"{script}: {name}"


def test_preference_scripts_have_the_same_settings_where_they_mean_the_same():
    fields = [{f.name: (f.default, f.type) for f in dataclasses.fields(load_script(script).Args)}
              for script in LANGUAGE_SCRIPTS[:2]]  # fmt: skip
    own = {"total_episodes", "batch_size", "learning_rate", "eval_every"}
    assert len(shared := set(fields[0]) & set(fields[1]) - own) > 20
    assert {name: fields[0][name] for name in shared} == {name: fields[1][name] for name in shared}


@each_script
def test_imports_nothing_of_this_repository(script):
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]  # .venv is not ours
    ours = {path.stem for folder in folders for path in folder.rglob("*.py")} | {path.name for path in folders}
    assert {"ppo", "rlhf_ppo", "run", "conftest", "algos"} <= ours
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not ours & {name.split(".")[0] for name in names}


@each_script
def test_common_flags_come_first_and_in_order(script):
    fields = list(load_script(script).Args.__dataclass_fields__)
    subject = ["model", "dataset"] if script.startswith("rlhf/") else ["env"]
    amount = next(name for name in ("total_timesteps", "total_episodes", "epochs") if name in fields)
    video = [] if script.startswith("rlhf/") else ["capture_video"]
    common = [*subject, "seed", amount, "device", "track", "run_dir", *video, "eval", "resume", "eval_episodes"]
    assert fields[: len(common)] == common


@each_script
def test_every_flag_is_explained(script, capsys):
    tree, lines = ast.parse(source(script)), source(script).splitlines()
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    for field, text in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):  # a comment behind the setting, or a docstring under it
            docstring = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and text.value.value
            assert docstring or re.search(r"  # \S.{9}", lines[field.end_lineno - 1]), f"{field.target.id} has no help"
    with pytest.raises(SystemExit) as stop:
        run_script(script, "--help")
    assert stop.value.code in (0, None)
    shown = capsys.readouterr().out
    for field in load_script(script).Args.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in shown


# The run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """alone(script): the script copied into an empty folder and run there, on a terminal that knows plain ASCII only;
    the folder and the process."""
    done = {}

    def run(script: str) -> tuple[Path, subprocess.CompletedProcess]:
        if script not in done:
            folder = tmp_path_factory.mktemp("alone")
            shutil.copy(ROOT / script, folder)
            argv = [sys.executable, Path(script).name, *tiny(script), *data_flags(script)]
            variables = environment(PYTHONPROFILEIMPORTTIME="1", PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="ascii")
            process = subprocess.run(argv, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
            done[script] = folder, process
        return done[script]

    return run


@each_script
def test_runs_alone_in_an_empty_folder(script, alone):
    folder, process = alone(script)
    assert process.returncode == 0, process.stderr[-2000:]
    assert sorted(path.name for path in folder.iterdir()) == sorted([Path(script).name, "runs"])
    [run] = (folder / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["script"] == Path(script).stem
    last = process.stdout.splitlines()[-1]
    assert last.endswith(f"runs/{run.name}") and " s " in last
    assert "\r" not in process.stdout  # no progress bar where nobody watches


@each_script
def test_a_terminal_that_lacks_characters_stops_nothing(script, alone):
    """Plain ASCII knows neither "·" nor "±" nor an arrow: the last line has question marks instead."""
    _, process = alone(script)
    assert process.returncode == 0, process.stderr[-2000:]
    assert process.stdout.isascii() and " ? " in process.stdout.splitlines()[-1]


@each_script
def test_wandb_is_not_imported_without_track(script, alone):
    _, process = alone(script)
    imported = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+([\w.]+)$", process.stderr, re.M)
    assert "torch" in imported  # the list is there
    assert not [name for name in imported if name.split(".")[0] == "wandb"]


@each_script
def test_run_folder_is_complete(script, trained):
    folder, module = trained(script), load_script(script)
    subject = r"[\w.\-]+"
    assert re.fullmatch(rf"{subject}__{Path(script).stem}__1__\d{{8}}-\d{{6}}(-\d+)?", folder.name)
    assert {"config.json", "metrics.csv", "model.pt", "curves.png", "summary.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not list(folder.glob("*.tmp"))

    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == Path(script).stem
    assert set(config["args"]) == set(module.Args.__dataclass_fields__)
    assert config["device"] == "cpu" or config["args"]["device"] == "auto"
    assert config["torch"] == torch.__version__ and config["python"] == sys.version.split()[0]

    rows = rows_of(folder)
    assert list(rows[0])[:2] == ["step", "seconds"]
    assert len(rows) >= 2
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and steps[0] > 0
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    drawn = [key for key in rows[0] if any(row[key] for row in rows)]
    assert len(drawn) >= 5  # step, seconds and curves

    summary = json.loads((folder / "summary.json").read_text())
    assert {"script", "seed", "steps", "train_seconds", "sps"} <= set(summary)
    assert summary["seed"] == 1 and summary["steps"] == steps[-1]
    assert 0 < summary["train_seconds"] < 300
    shortest, longest = summary["train_seconds"] - 0.0005, summary["train_seconds"] + 0.0005  # it is rounded
    assert summary["steps"] / longest - 1 <= summary["sps"]
    assert shortest <= 0 or summary["sps"] <= summary["steps"] / shortest + 1
    if script.startswith("algos/"):
        assert summary["env"] == module.Args().env
        assert summary["eval_episodes"] == int(tiny(script)[tiny(script).index("--eval-episodes") + 1])
        assert math.isfinite(summary["eval_return_mean"]) and summary["eval_return_std"] >= 0
        known = module.Args().env in gym.registry and gym.spec(module.Args().env).reward_threshold is not None
        assert known == ("solved_step" in summary) == ("solved_seconds" in summary)


@each_script
def test_model_and_curves_are_whole(script, trained):
    saved = checkpoint_of(trained(script))
    assert saved["script"] == Path(script).stem
    tensors = tensors_in(saved)
    assert tensors and all(torch.isfinite(tensor).all() for tensor in tensors)
    image = matplotlib.image.imread(trained(script) / "curves.png")
    assert image.shape[0] > 200 and image.shape[1] > 300
    assert image[..., :3].reshape(-1, 3).std() > 0.02  # something is drawn on it


@each_script
def test_one_seed_gives_one_result(script, trained, tmp_path):
    again = run_script(script, *tiny(script), "--run-dir", tmp_path)
    assert metrics_of(again) == metrics_of(trained(script))
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (trained(script), again))
    timed = {key for key in first if "seconds" in key or key == "sps"}
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}


@each_script
def test_another_seed_gives_another_result(script, trained, tmp_path):
    if script == "algos/dynamic_programming.py":
        pytest.skip("the solution of a known decision process is not random")
    other = run_script(script, *tiny(script), "--run-dir", tmp_path, "--seed", 2)
    assert metrics_of(other) != metrics_of(trained(script))


def wandb_history(file: Path) -> list[dict[str, float]]:
    """The metrics in an offline run's file: protocol buffers in LevelDB's log format behind 7 bytes of header.

    A record lies in one piece (type 1) or in several (2 first, 3 middle, 4 last), each behind its checksum,
    length and type; no piece crosses the border of a block of 32 KiB.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, pieces, history = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(pieces)
            pieces = b""
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                history.append(items)
    return history


@each_script
def test_track_leaves_an_offline_run_with_the_metrics(script, tmp_path):
    argv = command(script, *tiny(script), "--run-dir", tmp_path, "--track")
    variables = environment(WANDB_MODE="offline", WANDB_SILENT="true")
    process = subprocess.run(argv, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "Traceback" not in process.stderr
    [run] = tmp_path.glob("*__*")
    assert (run / "summary.json").is_file()
    [file] = run.glob("wandb/offline-run-*/*.wandb")
    history, rows = wandb_history(file), rows_of(run)
    assert [item["step"] for item in history] == [int(row["step"]) for row in rows]
    for item, row in zip(history, rows, strict=True):
        for key, value in row.items():
            assert (key in item) == bool(value)
            assert not value or item[key] == pytest.approx(float(value), rel=1e-6)


@each_script
def test_eval_repeats_the_score(script, trained, capsys, tmp_path):
    folder = tmp_path / trained(script).name
    shutil.copytree(trained(script), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shown = []
    for path in (folder, folder / "model.pt"):
        capsys.readouterr()
        run_script(script, "--eval", path, *tiny(script))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert re.search(r"\d\.\d", shown[0])
    assert {name: (folder / name).read_bytes() for name in before} == before  # the run stays as it was


@each_script
def test_resume_goes_on_from_the_saved_step(script, trained, tmp_path):
    folder = tmp_path / trained(script).name
    shutil.copytree(trained(script), folder)
    rows = rows_of(folder)
    assert run_script(script, "--resume", folder, *budget(script, 2)) == folder
    resumed = rows_of(folder)
    assert resumed[: len(rows)] == rows
    steps = [int(row["step"]) for row in resumed]
    assert steps == sorted(set(steps))
    if script == "algos/dynamic_programming.py":
        return  # it had converged: nothing is left to do
    assert len(resumed) > len(rows)
    assert float(resumed[-1]["seconds"]) > float(rows[-1]["seconds"])  # the clock goes on as well
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == steps[-1] == checkpoint_of(folder)["record"]["step"]


# Interrupted -----------------------------------------------------------------------------------------


def start_endless(script: str, run_dir: Path) -> tuple[subprocess.Popen, Path]:
    """A run that would not end, once it has reported twice and saved, and its folder."""
    flags = [*tiny(script), *ENDLESS.get(script, DEFAULT_ENDLESS).split()]
    # A shell starts background jobs deaf to Ctrl-C, and their children inherit it: hear it again.
    process = subprocess.Popen(command(script, *flags, "--run-dir", run_dir), env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for metrics in run_dir.glob("*/metrics.csv"):
            if metrics.read_text().count("\n") > 2 and (metrics.parent / "model.pt").exists():
                return process, metrics.parent
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no report within two minutes: {process.communicate()[1][-2000:]}")


def go_on(script: str, folder: Path) -> None:
    """Resumes the run and checks that it continues from the saved step."""
    step = checkpoint_of(folder)["record"]["step"]
    name, value = budget(script, 1)
    done = [row for row in rows_of(folder) if int(row["step"]) <= step]
    run_script(script, "--resume", folder, name, step + int(value))
    rows = rows_of(folder)
    assert rows[: len(done)] == done
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] > step
    assert (folder / "summary.json").is_file()


@each_script
def test_ctrl_c_saves_and_the_run_can_go_on(script, tmp_path):
    process, folder = start_endless(script, tmp_path)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors[-2000:]
    assert errors.startswith("error: interrupted at step ") and errors.count("\n") == 1
    assert f"--resume {folder}" in errors
    assert int(rows_of(folder)[-1]["step"]) == checkpoint_of(folder)["record"]["step"] > 0
    go_on(script, folder)


@each_script
def test_killed_run_stays_readable_and_can_go_on(script, tmp_path):
    process, folder = start_endless(script, tmp_path)
    process.kill()
    process.communicate()
    assert int(rows_of(folder)[-1]["step"]) >= checkpoint_of(folder)["record"]["step"] > 0
    go_on(script, folder)


def exploding(script: str) -> list[str]:
    flags = EXPLODE.get(script, DEFAULT_EXPLODE)
    if flags is None:
        pytest.skip("updates of tables are averages and stay finite")
    return flags.split()


@each_script
def test_loss_that_is_not_finite_keeps_the_last_good_checkpoint(script, trained, tmp_path, capsys):
    folder = tmp_path / trained(script).name
    shutil.copytree(trained(script), folder)
    step, rows = checkpoint_of(folder)["record"]["step"], rows_of(folder)
    with pytest.raises(SystemExit) as stop:
        run_script(script, "--resume", folder, *exploding(script), *budget(script, 3))
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert re.fullmatch(r"error: .* not finite .*|error: (losses|charts)/\w+ is (nan|-?inf) .*", message.strip())
    assert str(folder / "model.pt") in message
    assert step <= checkpoint_of(folder)["record"]["step"] <= int(re.search(r"at step (\d+)", message)[1])
    assert all(torch.isfinite(tensor).all() for tensor in tensors_in(checkpoint_of(folder)))
    assert rows_of(folder)[: len(rows)] == rows


@each_script
def test_loss_that_is_not_finite_from_the_start_saves_nothing_broken(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(script, *tiny(script), *exploding(script), "--run-dir", tmp_path)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "at step " in message and message.count("\n") == 1
    [folder] = tmp_path.iterdir()
    assert ("model.pt" in message) == (folder / "model.pt").exists()
    if (folder / "model.pt").exists():
        assert all(torch.isfinite(tensor).all() for tensor in tensors_in(checkpoint_of(folder)))
    assert not (folder / "summary.json").exists()


# Bad input -------------------------------------------------------------------------------------------


def check_refusal(code: object, errors: str) -> None:
    """Exit status 2 and one line that is a sentence to a person, or the whole message of tyro in its box."""
    assert code == 2, errors[-2000:]
    assert "Traceback" not in errors
    if "For full helptext" in errors:
        return
    assert errors.startswith("error: ") and errors.count("\n") == 1 and errors.endswith("\n")
    assert 20 < len(errors) < 600


def refusal(capsys, script: str, *flags: object) -> str:
    """The line with which the script refuses these flags."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(script, *flags)
    errors = capsys.readouterr().err
    check_refusal(stop.value.code, errors)
    return errors


BAD_VALUES = [
    "--no-such-flag 1", "--seed three", "--seed -1", "--total-timesteps 0", "--total-timesteps 1.5",
    "--total-episodes -1", "--epochs 0", "--device tpu", "--eval-episodes 0", "--gamma 1.5", "--gamma nan",
    "--gae-lambda -0.1", "--learning-rate 0", "--learning-rate nan", "--num-envs 0", "--batch-size 0",
    "--clip-coef -1", "--max-grad-norm 0", "--temperature 0", "--beta -1",
    "--kl-target 0", "--target-kl -1",
]  # fmt: skip


def test_weights_that_are_not_finite_are_not_saved(trained, tmp_path, capsys):
    module, folder = load_script("algos/ppo.py"), tmp_path / "run"
    shutil.copytree(trained("algos/ppo.py"), folder)
    weights = torch.nn.Linear(2, 2)
    run = module.Run(module.parse_args(["--run-dir", str(tmp_path)]), "run", 10**9, agent=weights)
    run.folder = folder
    run.save()
    with torch.no_grad():
        weights.weight[0, 0] = math.nan
    kept = (folder / "model.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run.save()
    assert stop.value.code == 1 and "is not finite" in capsys.readouterr().err
    assert (folder / "model.pt").read_bytes() == kept


@pytest.mark.parametrize("script", [f"algos/{name}.py" for name in ("ppo", "dqn", "sac", "a2c_gae", "reinforce")])
@pytest.mark.parametrize("anneal", [True, False])
def test_learning_rate_is_annealed_where_it_counts(script, anneal, tmp_path, monkeypatch):
    rates, original = [], torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    module, flag = load_script(script), "--anneal-lr" if anneal else "--no-anneal-lr"
    flags = [*tiny(script), "--learning-rate", "0.004", "--run-dir", str(tmp_path), flag]
    module.train(module.parse_args(flags))
    assert len(rates) > 3 and max(rates) <= 0.004 and rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.7 * rates[0] if anneal else set(rates) == {0.004}


@pytest.mark.parametrize("script", [f"algos/{name}.py" for name in ("ppo", "dqn", "a2c_gae", "reinforce")])
def test_environment_without_version_gets_one_line(script, capsys, tmp_path):
    assert "CartPole" in refusal(capsys, script, *tiny(script), "--env", "CartPole", "--run-dir", tmp_path)


@each_script
def test_bad_value_gets_one_line(script, capsys, tmp_path):
    known = load_script(script).Args.__dataclass_fields__
    for bad in BAD_VALUES:
        flag, value = bad.split()
        if flag[2:].replace("-", "_") in known or flag == "--no-such-flag":
            message = refusal(capsys, script, *tiny(script), "--run-dir", tmp_path, flag, value)
            assert flag in message, f"{bad}: {message}"
            assert not list(tmp_path.iterdir()), bad


@each_script
def test_bad_value_gets_one_line_in_evaluation_too(script, trained, capsys):
    refusal(capsys, script, "--eval", trained(script), "--eval-episodes", 0)


def unknown_subject(script: str, run_dir: Path) -> list[str]:
    subject = ["--model", "/no/such/model"] if script.startswith("rlhf/") else ["--env", "NoSuchThing-v0"]
    return [*tiny(script), "--run-dir", str(run_dir), *subject]


@each_script
def test_unknown_subject_gets_one_line(script, capsys, tmp_path):
    flags = unknown_subject(script, tmp_path)
    assert flags[-1] in refusal(capsys, script, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["algos/ppo.py", "rlhf/dpo.py"])  # the text that decides it is the same everywhere
def test_a_refusal_is_exit_status_2_in_the_shell(script, tmp_path):
    flags = unknown_subject(script, tmp_path)
    process = subprocess.run(command(script, *flags), env=environment(), capture_output=True, text=True, timeout=120)
    check_refusal(process.returncode, process.stderr)
    assert flags[-1] in process.stderr and not list(tmp_path.iterdir())


@each_script
def test_missing_data_gets_one_line(script, capsys, tmp_path):
    """As in a copy of a language script that has no data beside it."""
    if not script.startswith("rlhf/"):
        pytest.skip("needs no data")
    for flag in ("--model", "--dataset"):
        message = refusal(capsys, script, *tiny(script), flag, tmp_path / "data" / "nothing", "--run-dir", tmp_path)
        assert str(tmp_path / "data" / "nothing") in message
    assert not list(tmp_path.iterdir())


class Odd(gym.Env):
    """An environment whose spaces no script handles."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.MultiBinary(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


@each_script
def test_spaces_it_cannot_handle_get_one_line(script, capsys, tmp_path):
    if script.startswith("rlhf/"):
        pytest.skip("no environment")
    if "Odd-v0" not in gym.registry:
        gym.register("Odd-v0", Odd, max_episode_steps=5)
    assert "Odd-v0" in refusal(capsys, script, *tiny(script), "--env", "Odd-v0", "--run-dir", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["algos/ppo.py", "algos/dqn.py", "algos/a2c_gae.py", "algos/reinforce.py"])
def test_environment_of_a_package_that_gymnasium_imports(script, tmp_path, monkeypatch):
    (tmp_path / "a_package.py").write_text(
        "import gymnasium\n"
        "point = 'gymnasium.envs.classic_control:CartPoleEnv'\n"
        "gymnasium.register('Mine-v0', point, max_episode_steps=50, reward_threshold=45)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = run_script(script, *tiny(script), "--env", "a_package:Mine-v0", "--run-dir", tmp_path)
    assert "solved_step" in json.loads((folder / "summary.json").read_text())


class Trap:
    """An object that, unpickled by a careless loader, would do something."""

    def __reduce__(self):
        return open, ("sprung", "w")


@each_script
@pytest.mark.parametrize("flag", ["--eval", "--resume"])
def test_bad_checkpoint_gets_one_line(script, flag, trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no saved model" in refusal(capsys, script, flag, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no saved model" in refusal(capsys, script, flag, tmp_path / "empty")

    whole, file = (trained(script) / "model.pt").read_bytes(), tmp_path / "model.pt"
    for content in (b"", b"not a model", whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert "not a readable checkpoint" in refusal(capsys, script, flag, file)
    for content in ([1, 2], {"weights": torch.zeros(2)}, {"script": Path(script).stem, "args": Trap()}):
        torch.save(content, file)
        assert "not a readable checkpoint" in refusal(capsys, script, flag, file)
    assert not (tmp_path / "sprung").exists()

    saved = checkpoint_of(trained(script))
    torch.save(saved | {"script": "another"}, file)
    assert "another.py" in refusal(capsys, script, flag, file)
    torch.save(saved | {"args": saved["args"] | {"flag_of_old": 1}}, file)
    assert "flag_of_old" in refusal(capsys, script, flag, file)


@each_script
@pytest.mark.parametrize("flag", ["--eval", "--resume"])
def test_checkpoint_of_other_shapes_gets_one_line(script, flag, trained, capsys, tmp_path):
    """The command line asks for a network or a table that the saved one does not fit into."""
    folder = tmp_path / "run"
    shutil.copytree(trained(script), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    others = [name for name in load_script(script).PRESETS if name != load_script(script).Args().env]
    if not others or "env" not in load_script(script).Args.__dataclass_fields__:
        pytest.skip("no second environment")
    refusal(capsys, script, flag, folder, "--env", others[0])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@each_script
def test_unwritable_run_folder_gets_one_line(script, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")
    message = refusal(capsys, script, *tiny(script), "--run-dir", tmp_path / "file" / "runs")
    assert str(tmp_path / "file") in message


@each_script
def test_missing_accelerator_gets_one_line(script, capsys, tmp_path):
    absent = [name for name in ("cuda", "mps") if not getattr(torch, name).is_available()]
    for name in absent:
        message = refusal(capsys, script, *tiny(script), "--run-dir", tmp_path, "--device", name)
        assert f"--device {name}" in message and "--device cpu" in message
    assert not list(tmp_path.iterdir())


@each_script
def test_track_without_wandb_gets_one_line(script, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now fails
    assert "wandb" in refusal(capsys, script, *tiny(script), "--run-dir", tmp_path, "--track")
    assert not list(tmp_path.iterdir())


# Devices and pictures --------------------------------------------------------------------------------


@each_script
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_smoke_on_every_device(script, device, tmp_path, capsys):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    folder = run_script(script, *tiny(script), "--run-dir", tmp_path, "--device", device)
    if script not in EXPLODE:  # the scripts with tables stay on the CPU
        assert json.loads((folder / "config.json").read_text())["device"].startswith(device)
    assert all(torch.isfinite(tensor).all() for tensor in tensors_in(checkpoint_of(folder)))
    run_script(script, "--resume", folder, *budget(script, 2))
    run_script(script, "--eval", folder, "--device", "cpu")
    assert re.search(r"\d\.\d", capsys.readouterr().out)


def test_capture_video_leaves_a_film(trained, tmp_path):
    from moviepy import VideoFileClip

    folder = tmp_path / "run"
    shutil.copytree(trained("algos/ppo.py"), folder)
    run_script("algos/ppo.py", "--eval", folder, "--capture-video", "--eval-episodes", 1)
    [film] = folder.glob("videos/*.mp4")
    with VideoFileClip(str(film)) as clip:
        assert clip.duration > 0.2
        frame = clip.get_frame(0)
    assert frame.ndim == 3 and frame.std() > 1


def test_the_command_line_counts_denormal_numbers_as_zero(tmp_path):
    """The text is the same in every script; where gradients die out such numbers cost most of a run's time."""
    argv = ["ppo.py", *tiny("algos/ppo.py"), "--run-dir", str(tmp_path)]
    code = (
        f"import runpy, sys, torch; sys.argv = {argv!r};"
        f"runpy.run_path({str(ROOT / 'algos/ppo.py')!r}, run_name='__main__');"
        "assert (torch.tensor([1e-20]) * 1e-20).item() == 0"
    )
    process = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]


def test_every_preset_is_made_of_the_scripts_flags():
    """MuJoCo's environments, which the tests do without, included."""
    robots = {"algos/ppo.py", "algos/sac.py"}
    for script in (load_script(path) for path in SCRIPTS):
        for preset in getattr(script, "PRESETS", {}).values():
            script.Args(**preset)
    assert all("HalfCheetah-v5" in load_script(path).PRESETS for path in robots)


def test_tiny_budgets_name_scripts_that_exist():
    assert DEFAULT_TINY and set(TINY) | set(ENDLESS) <= set(SCRIPTS)
