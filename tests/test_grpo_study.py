"""The study of GRPO: PPO in its place, runs that are shared, resumed and drawn."""

import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, tiny

sys.path.insert(0, str(ROOT / "benchmarks"))
import grpo_study as study

TINY = [*tiny("rlhf/grpo.py"), "--total-episodes", "160", "--eval-every", "5"]  # ten rows, two evaluations


@pytest.fixture
def grpo():
    return study.load_script("rlhf/grpo.py")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Results, figures and the page in a folder of the test's own."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(study, "PAGE", tmp_path / "benchmarks.md")
    (tmp_path / "benchmarks.md").write_text("# Page\n")
    return tmp_path


@pytest.mark.parametrize("rewards", ["mixed", "none"])
def test_ppo_makes_rewarded_answers_likelier(grpo, rewards):
    """And where nothing is rewarded, it changes nothing."""
    torch.manual_seed(0)
    args = grpo.Args(num_prompts=2, group_size=8, learning_rate=1e-3)
    tokenizer, lm = grpo.new_lm()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=args.learning_rate)
    rng, cups = np.random.default_rng(0), {"cups": grpo.load_reward("cups")}
    batch = grpo.rollout(args, Accelerator(cpu=True), lm, tokenizer, cups, None, 2, rng)
    paid = torch.zeros(2, 8)
    if rewards == "mixed":
        paid[:, :3] = 1
    batch["rewards"] = paid
    prompts = [row["ids"] for row in batch["rows"] for _ in range(args.group_size)]
    prompt_ids, prompt_mask = grpo.pad(prompts, 0, "left")
    tokens, mask = batch["tokens"].flatten(0, 1), batch["mask"].flatten(0, 1)
    ids, seen = torch.cat((prompt_ids, tokens), 1), torch.cat((prompt_mask, mask), 1)

    def likelihood():
        with torch.no_grad():
            return (grpo.token_logprobs(lm, ids, seen, mask.shape[1], 1.0)[0] * mask).sum(1).view(2, 8)

    before, weights, ppo = likelihood(), [p.clone() for p in lm.parameters()], study.ValueFunction()
    for _ in range(5):
        ppo.update(args, Accelerator(cpu=True), lm, None, optimizer, batch, rng)
    gained = likelihood() - before
    if rewards == "none":
        assert all(torch.allclose(p, old, atol=1e-6) for p, old in zip(lm.parameters(), weights, strict=True))
    else:
        assert gained[:, :3].mean() > gained[:, 3:].mean() + 0.1
        assert ppo.agent.value_head.bias.item() > 0  # the mean reward is


def test_comparison_shares_starts_goes_on_and_draws(grpo, own_folder, monkeypatch):
    names = [study.DEFAULT, "PPO with a value function", "length: per token", "right samples only"]
    starts, warm_start = [], grpo.warm_start
    monkeypatch.setattr(grpo, "warm_start", lambda *given: starts.append(warm_start(*given)))
    original = grpo.warm_start, grpo.update, grpo.group_advantages
    reward = own_folder / "reward.py"
    reward.write_text(
        "def short(prompts, completions, **_):\n    return [float(len(text) < 30) for text in completions]\n"
    )
    flags = [*TINY, "--reward", f"{reward}:short"]
    study.compare(grpo, [1], names[:2], flags)
    assert (grpo.warm_start, grpo.update, grpo.group_advantages) == original
    first = study.read("grpo_compare.csv")
    assert [row["variant"] for row in first] == names[:2]
    assert len(starts) == 1  # for both
    monkeypatch.setitem(study.VARIANTS, names[0], "--no-such-flag")  # what is there is not run again
    study.compare(grpo, [1], names, flags)
    rows = study.read("grpo_compare.csv")
    assert str(rows[:2]) == str(first) and [row["variant"] for row in rows] == names
    assert len({row["losses/entropy"] for row in rows}) > 2
    study.publish()
    page = (own_folder / "benchmarks.md").read_text()
    assert all(f"| {name} | 1 |" in page for name in names)
    assert matplotlib.image.imread(own_folder / "figures" / "grpo_compare.png").std() > 0.02


def test_pass_at_k_is_measured_before_and_after(grpo, own_folder, monkeypatch):
    monkeypatch.setattr(study, "KS", [1, 2, 4])
    study.passk(grpo, [1], TINY, problems=2, samples=4)
    rows = study.read("grpo_passk.csv")
    assert [(row["model"], row["problems"]) for row in rows] == [
        ("start", "held out"), ("start", "harder"), ("policy", "held out"), ("policy", "harder"),
    ]  # fmt: skip
    assert all(0 <= row["pass@1"] <= row["pass@2"] <= row["pass@4"] <= 1 for row in rows)
    study.passk(grpo, [1], ["--no-such-flag"], problems=2, samples=4)  # it is there
    study.publish()
    assert "| harder, after GRPO | 1 |" in (own_folder / "benchmarks.md").read_text()
    assert matplotlib.image.imread(own_folder / "figures" / "grpo_passk.png").std() > 0.02
