"""The README and the study documents point at what is there: links, functions, flags, metrics, changed lines,
formulas, commands."""

import ast
import functools
import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, tiny

PATHS = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PAGES = {name: path.read_text() for name, path in PATHS.items()}
each_page = pytest.mark.parametrize("page", PAGES)

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
MATH = re.compile(r"\$`([^`]*)`\$")
SCRIPT = r"((?:algos|rlhf)/\w+\.py)"
LINK = rf"\]\((?:\.\./)?{SCRIPT}\)"
COMMAND = rf"\b(?:python3?|launch)(?: --num-processes \d)? {SCRIPT}([^\n`|#]*)"

# Names from elsewhere: TRL 1.12's PPO and its metrics, TRL 1.16's trainers, gymnasium's modes.
FOREIGN = set(
    re.findall(
        r"\S+",
        """PPOTrainer PPOTrainer.train() PolicyAndValueWrapper DataLoader batch_generation() generate()
        truncate_response() first_true_indices() selective_log_softmax() forward() get_reward() masked_whiten()
        optimizer.step() lr_scheduler.step() generate_completions() _save_checkpoint()
        objective/scores objective/rlhf_reward objective/entropy
        SFTTrainer RewardTrainer RLOOTrainer GRPOTrainer DPOTrainer KTOTrainer ORPOTrainer CPOTrainer OnlineDPOTrainer
        NEXT_STEP SAME_STEP""",
    )
)

# What GitHub's renderer knows of LaTeX and these pages use; \operatorname, for one, it refuses.
COMMANDS = set(
    re.findall(
        r"\\\w+",
        r"""\alpha \beta \gamma \delta \epsilon \varepsilon \theta \bar \lambda \mu \omega \phi \pi \rho \sigma \tau
        \nabla \ell \mathbb \mathcal \mathrm \text \hat \log \max \min \arg \sum \frac \tfrac \infty \sim \mid \succ
        \Vert \lvert \rvert \ge \le \ne \approx \propto \leftarrow \dots \quad \qquad \begin \end \big \Big \tanh""",
    )
)


def without_math(text: str) -> str:
    return MATH.sub("", re.sub(r"^```math\n.*?^```$", "", text, flags=re.M | re.S))


def anchors(text: str) -> set[str]:
    """The names under which GitHub makes the headings of a page reachable."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def sections(text: str) -> list[str]:
    return re.split(r"^(?=###? )", text, flags=re.M)


@functools.cache
def names_in(script: str) -> set[str]:
    """Functions, classes and methods (as Class.method) of a script."""
    tree = ast.parse((ROOT / script).read_text())
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@functools.cache
def flags_of(script: str) -> set[str]:
    """Every flag that a script takes, --no- forms included."""
    tree = ast.parse((ROOT / script).read_text())
    settings = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [node for node in settings.body if isinstance(node, ast.AnnAssign)]
    names = {field.target.id.replace("_", "-"): ast.unparse(field.annotation) for field in fields}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name, kind in names.items() if kind == "bool"}


def mentions(text: str) -> list[tuple[str, str]]:
    """(code, script) for each piece of inline code, and the flags of each command, of a page.

    Code speaks of the script named last before it in its section, or, if none was, of the first named after.
    """
    found = []
    for section in sections(without_math(text)):
        script, waiting = "", []
        for match in re.finditer(rf"{LINK}|^(?!- |\|).*?{COMMAND}|^```\w*$|`([^`\n]+)`", section, re.M):
            linked, run, flags, code = match.groups()
            if inline := re.search(COMMAND, code or ""):
                run, flags, code = *inline.groups(), None
            if linked or run:
                script = linked or run
                found += [(flags, script)] * bool(flags) + [(code, script) for code in waiting]
                waiting = []
            elif code and not code.startswith(("pip ", "trl ", "ruff ")):
                found += [(code, script)] if script else []
                waiting += [] if script else [code]
        found += [(code, "") for code in waiting]
    return found


@each_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", without_math(PAGES[page]))
    for text, target in links:
        if target.startswith("http"):
            number = re.fullmatch(r"https://arxiv\.org/abs/(\d{4}\.\d{4,5})", target)
            assert ("arxiv" in target) == bool(number) and (not number or text == number[1]), target
            continue
        path, _, anchor = target.partition("#")
        file = (PATHS[page].parent / path).resolve() if path else PATHS[page]
        assert file.exists(), target
        assert not text.endswith(".py") or str(file).endswith("/" + text), f"{text} leads to {target}"
        assert not anchor or anchor in anchors(file.read_text()), target


def writes(script: str, metric: str) -> bool:
    """Whether the script has the metric's name; those under eval/ are put together from what evaluate() names."""
    text, name = (ROOT / script).read_text(), metric.removeprefix("eval/")
    return f'"{metric}"' in text or (name != metric and 'f"eval/{name}"' in text and f'"{name}"' in text)


@each_page
def test_names_are_those_of_the_script(page):
    for code, script in mentions(PAGES[page]):
        flags = set(re.findall(r"(?:^|\s)(--[a-z][a-z0-9-]*)", code)) - {"--help"}
        if code in FOREIGN:
            continue
        name = re.fullmatch(r"([\w.]+)\(\)|([A-Z]\w+)", code)
        metric = re.match(r"(charts|losses|objective|eval|rewards|logps)/\w", code)
        for one in [script] if script else SCRIPTS:  # where the section names none, it speaks of all
            assert flags <= flags_of(one), f"{one} has no {code}"
            assert not name or (name[1] or name[2]) in names_in(one), f"{one} defines no {code}"
            assert not metric or writes(one, code), f"{one} writes no {code}"


@each_page
def test_changed_lines_are_there_and_the_changed_script_compiles(page):
    for section in sections(PAGES[page]):
        for match in BLOCK.finditer(section):
            if match[1] != "diff":
                continue
            script = re.findall(LINK, section[: match.start()])[-1]
            text, lines = (ROOT / script).read_text(), match[2].splitlines()
            assert {line[:1] for line in lines} <= set(" +-")
            before, after = ("\n".join(line[1:] for line in lines if line[0] in kept) + "\n" for kept in (" -", " +"))
            assert text.count("\n" + before) == 1, f"{script} has not exactly one place like\n{before}"
            assert before != after
            compile(text.replace(before, after), script, "exec")


@each_page
def test_formulas_are_ones_that_github_renders(page):
    text = PAGES[page]
    blocks = [body for kind, body in BLOCK.findall(text) if kind == "math"]
    for formula in (*blocks, *MATH.findall(text)):
        bare = re.sub(r"\\[{}]", "", formula)
        depths = [bare[:i].count("{") - bare[:i].count("}") for i in range(len(bare) + 1)]
        assert min(depths) == 0 == depths[-1], formula
        assert set(re.findall(r"\\[a-zA-Z]+", formula)) <= COMMANDS, formula
        begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", formula) for word in ("begin", "end"))
        assert begun == ended, formula
        assert len(re.findall(r"(?<!\\)&", formula)) == 0 or begun, formula
    for row in re.findall(r"^\|.*\|$", text, re.M):
        assert not any("|" in formula for formula in MATH.findall(row)), f"a bar ends the cell: {row}"
    assert "$" not in re.sub(r"`[^`]*`", "", BLOCK.sub("", MATH.sub("", text))), "inline formulas stand in $` and `$"


@each_page
def test_tables_have_as_many_cells_in_every_row(page):
    tables = re.findall(r"(?:^\|.*\|\n)+", BLOCK.sub("", PAGES[page]), re.M)
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", MATH.sub("", row))) for row in table.splitlines()}
        assert len(widths) == 1, table


def test_every_idea_and_every_symptom_ends_in_something_to_try():
    ideas = re.split(r"^(?=\*\*)", PAGES["eli5.md"], flags=re.M)[1:]
    assert len(ideas) > 20
    assert all("```bash\npython " in idea for idea in ideas)
    symptoms = re.split(r"^(?=### )", PAGES["troubleshooting.md"], flags=re.M)[1:]
    assert len(symptoms) > 10
    for symptom in symptoms:
        parts = re.findall(r"^\*\*(.+?)\*\*", symptom, re.M)
        assert parts == ["Causes", "Look at", "Repair", "Provoke"], symptom.splitlines()[0]


# Every command of the documents runs in test_readme.py, within one process. Here the README's first commands are
# started as a reader starts them; pixels, the slow one, are left to the other tests.
TABLE = PAGES["README.md"].split("| first command |")[1].split("\n\n")[0]
FIRST = re.findall(r"^\| .*? \| `(python .*?)` \|", TABLE, re.M)


def test_the_readme_has_first_commands():
    assert len(FIRST) == 4


@pytest.mark.parametrize("command", [command for command in FIRST if "dqn_atari" not in command])
def test_shown_command_runs_in_a_shell(command, tmp_path):
    _, script, *flags = shlex.split(command)
    argv = [sys.executable, script, *flags, *tiny(script), "--run-dir", str(tmp_path)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(argv, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    [folder] = tmp_path.iterdir()
    assert (folder / "summary.json").is_file() and process.stdout.splitlines()[-1].endswith(str(folder))


@each_page
def test_named_tests_exist(page):
    for file, word in re.findall(r"pytest (tests/\w+\.py) -k (\w+)", PAGES[page]):
        assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(), re.M), f"{file} has no test {word}"
    for name, file in re.findall(r"`(test_\w+)` in\s+\[(tests/\w+\.py)\]", PAGES[page]):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"


# Code that the documents show --------------------------------------------------------------------


def python_block(page: str) -> str:
    [code] = [body for kind, body in BLOCK.findall(PAGES[page]) if kind == "python"]
    return code


def test_readme_code_trains_on_an_environment_of_ones_own(tmp_path):
    (tmp_path / "my_package.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('MyEnv-v0', 'gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=50)\n"
    )
    shutil.copy(ROOT / "algos" / "ppo.py", tmp_path)
    code = python_block("README.md").replace("200_000", "2_000, eval_episodes=2")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    assert list(tmp_path.glob("runs/MyEnv-v0__ppo__1__*/summary.json"))


@pytest.mark.xdist_group("rlhf/rlhf_ppo.py")
def test_trl_goes_on_with_our_folders(trained, tmp_path, monkeypatch):
    """The trace's code, for one step; and TRL has the trainers that the trace names."""
    trl = pytest.importorskip("trl", reason="the pinned TRL needs Python 3.11")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path[:])
    code = python_block("trl_ppo_trace.md")
    for old, new in {"runs/<folder>": str(trained("rlhf/rlhf_ppo.py")), "runs/rloo": str(tmp_path), "=64": "=8",
                     "max_steps=20": "max_steps=1, use_cpu=True", "length=24": "length=4"}.items():  # fmt: skip
        assert old in code
        code = code.replace(old, new)
    shown: dict = {}
    exec(compile(code, "trl_ppo_trace.md", "exec"), shown)
    [log] = [row for row in shown["trainer"].state.log_history if "reward" in row]
    assert log["reward"] != 0 and math.isfinite(log["reward"])
    stable = re.findall(r"`(\w+Trainer)`", PAGES["trl_ppo_trace.md"].split("## Where the stages live today")[1])
    for name in set(stable) - {"PPOTrainer"}:
        assert hasattr(trl, name) or any(
            hasattr(importlib.import_module(f"trl.experimental.{part}"), name) for part in ("orpo", "cpo", "online_dpo")
        )
