"""What the README and the headers say is true: their commands run, and the requirements hold together."""

import ast
import os
import re
import shlex
import shutil
import sys

import gymnasium as gym
import pytest
from conftest import ROOT, SCRIPTS, each_script, parse_flags, run_script, tiny
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

README = (ROOT / "README.md").read_text()
INDIRECT = {"RecordVideo": "moviepy", "AtariPreprocessing": "opencv-python"}  # what parts of gymnasium import


def header(script: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / script).read_text())) or ""


def commands_in(text: str) -> list[str]:
    """The commands of this repository's scripts in Markdown code or in a header, without their comments."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:python3?|launch) ((?:algos|rlhf)/\w+\.py\b[^`#&|]*)", line) for line in lines]
    return [re.sub(r"\s{2,}\(.*", "", match[1]).strip() for match in found if match]


def documented_commands() -> list:
    texts = [README, *map(header, SCRIPTS)]
    texts += [path.read_text() for path in sorted(ROOT.glob("docs/*.md"))]
    commands = dict.fromkeys(command for text in texts for command in commands_in(text))
    return [pytest.param(command, marks=pytest.mark.xdist_group(command.split()[0])) for command in commands]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_command_runs(command, trained, tmp_path, monkeypatch):
    """Each runs, on a tiny budget. Names of models and data sets on a hub are only parsed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    script, *flags = shlex.split(command.replace("<", "{").replace(">", "}").replace("$seed", "2"))
    # A player that has learnt nothing never serves in Breakout, and the game lasts for half an hour.
    flags = [flag.replace("ALE/Breakout-v5", "ALE/Pong-v5") for flag in flags]
    if "runs/<folder>" in command:
        shutil.copytree(trained(script), tmp_path / "run")
        flags = [flag.replace("runs/{folder}", str(tmp_path / "run")) for flag in flags]
    (tmp_path / "my_reward.py").write_text("def score(texts):\n    return [float(len(text)) for text in texts]\n")
    flags = [flag.replace("my_reward.py", str(tmp_path / "my_reward.py")) for flag in flags]
    args = parse_flags(script, *flags)
    spec = gym.registry.get(getattr(args, "env", None))
    if spec and "mujoco" in str(spec.entry_point):
        pytest.importorskip("mujoco", reason="an optional requirement")
    for name in ("model", "dataset"):
        if getattr(args, name, None) not in (None, "new") and not os.path.exists(getattr(args, name)):
            return
    run_script(script, *flags, *tiny(script), "--run-dir", tmp_path / "runs")


def test_every_script_is_in_the_table_and_has_commands():
    rows = re.findall(r"^\| .* \| \[(\w+\.py)\]\(((?:algos|rlhf)/\w+\.py)\) \| `python ([\w/.]+)", README, re.M)
    assert sorted(path for _, path, _ in rows) == SCRIPTS
    assert all(path.endswith("/" + name) and path == command for name, path, command in rows)
    for script in SCRIPTS:
        assert all(command.startswith(script) for command in commands_in(header(script)))
        assert commands_in(header(script)), script


def test_lines_to_read_are_counted():
    lines = {"algos": [], "rlhf": []}
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        own = text[text.index("# 1. Settings") : text.index("# 7. Run record")]
        lines[script.split("/")[0]].append(own.count("\n"))
    said = re.search(r"is (\d+) to (\d+) lines in `algos/`.*? have (\d+) to (\d+)", README, re.S)
    assert [int(number) for number in said.groups()] == [f(own) for own in lines.values() for f in (min, max)]


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_continuous_integration_runs_the_test_command_of_the_readme():
    pattern = re.search(r"sed -n 's\|(.+)\|\\1\|p' README.md", (ROOT / ".ci" / "run").read_text())[1]
    found = re.findall(pattern.replace(r"\(", "(").replace(r"\)", ")"), README, re.M)
    assert len(found) == 1 and found[0].startswith("python -m pytest tests")


# requirements.txt and the inline metadata ------------------------------------------------------------


def pins() -> dict[str, tuple[str, set[str]]]:
    """The pinned version and the extras of each package, as this Python gets them."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    found = {}
    for requirement in (Requirement(line) for line in lines if line):
        if requirement.marker is None or requirement.marker.evaluate():
            [specifier] = requirement.specifier
            assert specifier.operator == "==", f"{requirement} is not pinned"
            assert requirement.name.lower() not in found, f"{requirement.name} is named twice"
            found[requirement.name.lower()] = specifier.version, requirement.extras
    return found


def metadata(script: str) -> dict:
    """The inline metadata at the top of a script (PEP 723)."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", (ROOT / script).read_text())[1]
    return tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))


@each_script
def test_lower_bounds_admit_the_tested_versions(script):
    assert metadata(script)["requires-python"] == ">=3.10"
    for requirement in map(Requirement, metadata(script)["dependencies"]):
        assert requirement.name.lower() in pins(), f"{requirement.name} is missing in requirements.txt"
        version, extras = pins()[requirement.name.lower()]
        assert [specifier.operator for specifier in requirement.specifier] == [">="]
        assert requirement.specifier.contains(version), f"requirements.txt has {requirement.name} {version}"
        assert requirement.extras <= extras


@each_script
def test_metadata_names_what_the_script_imports(script):
    text = (ROOT / script).read_text()
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    imported = {name.lower().replace("_", "-") for name in imported - set(sys.stdlib_module_names)}
    imported |= {package for name, package in INDIRECT.items() if name in text}
    assert {Requirement(line).name.lower() for line in metadata(script)["dependencies"]} == imported


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    assert {name: version(name).split("+")[0] for name in pins()} == {name: pin for name, (pin, _) in pins().items()}
