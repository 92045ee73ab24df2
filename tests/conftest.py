"""Loads and runs the scripts, which are no package: each is a file on its own."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("algos", "rlhf") for path in (ROOT / folder).glob("*.py")
)

# What makes a run of a script tiny: a second or two, with several reports. A script that is not named
# here gets DEFAULT_TINY, so a new one is tested by being there.
DEFAULT_TINY = "--total-timesteps 10000 --eval-episodes 2"
TINY = {
    "algos/dynamic_programming.py": "--total-timesteps 50 --eval-episodes 2",
    "algos/dqn_atari.py": "--total-timesteps 400 --eval-episodes 1 --frame-skip 30 --num-envs 2 --buffer-size 2000"
    " --learning-starts 100 --train-frequency 32 --batch-size 8",
    "algos/sac.py": "--total-timesteps 1000 --eval-episodes 2 --learning-starts 200 --batch-size 32 --hidden 16",
    "algos/td3.py": "--total-timesteps 1000 --eval-episodes 2 --learning-starts 200 --batch-size 32 --hidden 16",
    "rlhf/dpo.py": "--train-split train[:300] --eval-split test[:40] --total-episodes 128 --eval-episodes 16"
    " --eval-every 4 --batch-size 16 --max-completion-length 16",
    "rlhf/grpo.py": "--warmup-steps 2 --total-episodes 64 --num-prompts 4 --group-size 4 --eval-episodes 4"
    " --eval-samples 2 --eval-every 2 --max-completion-length 12",
    "rlhf/pretrain.py": "--total-episodes 1280 --eval-episodes 8 --report-every 320 --valid-every 640"
    " --hidden 32 --layers 1 --heads 2 --max-vocab 500",
    "rlhf/rlhf_ppo.py": "--train-split train[:100] --reward-split train[:100] --eval-split test[:40]"
    " --total-episodes 64 --eval-episodes 16 --eval-every 4 --batch-size 16 --max-completion-length 16",
}

# The tests of one script share its tiny run, so pytest-xdist gives them to one worker.
each_script = pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.xdist_group(s)) for s in SCRIPTS])


def load_script(path: str):
    """The script at this path (relative to the repository) as a module, loaded once."""
    name = "plainrl_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def tiny(script: str) -> list[str]:
    """The flags of a tiny run."""
    return TINY.get(script, DEFAULT_TINY).split()


def parse_flags(script: str, *flags: object):
    """The settings that the flags, presets and defaults give."""
    return load_script(script).parse_args([str(flag) for flag in flags])


def run_script(script: str, *flags: object) -> Path:
    """What `python script flags` does, without starting a process; the run folder."""
    return load_script(script).train(parse_flags(script, *flags))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(script) is the folder of one tiny run of the script, made when first asked for. Only read it."""
    folders = {}

    def folder_of(script: str) -> Path:
        if script not in folders:
            folders[script] = run_script(script, *tiny(script), "--run-dir", tmp_path_factory.mktemp("trained"))
        return folders[script]

    return folder_of
