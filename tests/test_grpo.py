"""grpo.py: advantages, losses, verifiers, rewards and data, and that it learns."""

import copy
import csv
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, load_script

grpo = load_script("rlhf/grpo.py")

TINY = (
    "--warmup-steps 2 --total-episodes 64 --num-prompts 4 --group-size 4 --eval-episodes 4 --eval-samples 2"
    " --eval-every 2 --max-completion-length 12"
)


def write(file, *lines):
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def train(folder, *flags):
    """The folder of a run with these flags."""
    argv = [word for flag in flags for word in str(flag).split()]
    return grpo.train(grpo.parse_args([*argv, "--run-dir", str(folder)]))


def rows_of(run, clocks=("seconds", "charts/SPS")):
    """metrics.csv without the columns that a clock writes."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key not in clocks} for row in csv.DictReader(file)]


def error_of(capsys, *flags):
    """The one line with which these flags are refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(*flags)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


# Advantages and losses --------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    std, batch_std = math.sqrt(6 / 3), math.sqrt(8 / 7)
    by_hand = {
        "dr_grpo": [[0, -1, -1, 2], [0, 0, 0, 0]],
        "grpo": [[0, -1 / std, -1 / std, 2 / std], [0, 0, 0, 0]],
        "rloo": [[1 - 1, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3], [0, 0, 0, 0]],
        "reinforce++": [[-0.5 / batch_std, -1.5 / batch_std, -1.5 / batch_std, 1.5 / batch_std], [0.5 / batch_std] * 4],
    }
    assert np.var([1, 0, 0, 3, 2, 2, 2, 2], ddof=1) == pytest.approx(batch_std**2)
    for kind, values in by_hand.items():
        expected = torch.tensor(values, dtype=torch.float32)
        torch.testing.assert_close(grpo.group_advantages(rewards, kind), expected, atol=3e-4, rtol=0)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_advantages_leave_out_what_has_no_reward(kind):
    """A NaN gets advantage 0 and the others what they would get without it; order in a group does not matter."""
    rewards = torch.tensor([[1.0, math.nan, 0.0, 5.0]])
    found = grpo.group_advantages(rewards, kind)
    without = grpo.group_advantages(rewards[:, [0, 2, 3]], kind)
    torch.testing.assert_close(found, torch.tensor([[without[0, 0], 0, without[0, 1], without[0, 2]]]))
    order = [2, 0, 3, 1]
    torch.testing.assert_close(grpo.group_advantages(rewards[:, order], kind), found[:, order])
    lonely = grpo.group_advantages(torch.tensor([[math.nan, 4.0], [math.nan, math.nan]]), kind)
    assert lonely.tolist() == [[0, 0], [0, 0]]  # never NaN


def test_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    expected = {
        "sequence": [[1 / 12] * 4, [1 / 6, 1 / 6, 0, 0], [0] * 4],
        "token": [[1 / 6] * 4, [1 / 6, 1 / 6, 0, 0], [0] * 4],
        "constant": [[1 / 30] * 4, [1 / 30, 1 / 30, 0, 0], [0] * 4],
    }
    for norm, weights in expected.items():
        torch.testing.assert_close(grpo.token_weights(mask, norm, 10), torch.tensor(weights))


def test_clipped_loss_by_hand():
    ratios = torch.tensor([[0.5, 1.0, 1.5, 9.0], [0.5, 1.0, 1.5, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    loss, low, high = grpo.policy_loss(
        ratios.log(), torch.zeros(2, 4), torch.tensor([2.0, -1.0]), mask, clip_low=0.2, clip_high=0.28
    )
    torch.testing.assert_close(loss[:, :3], torch.tensor([[-1.0, -2.0, -2.56], [0.8, 1.0, 1.5]]))
    assert low.tolist() == [[False] * 4, [True, False, False, False]]
    assert high.tolist() == [[False, False, True, False], [False] * 4]


def test_sequence_ratio_is_the_geometric_mean():
    ratios, mask = torch.tensor([[2.0, 8.0, 99.0]]), torch.tensor([[1, 1, 0]])
    loss, _, high = grpo.policy_loss(ratios.log(), torch.zeros(1, 3), torch.tensor([1.0]), mask, 0.2, 9.0, "sequence")
    torch.testing.assert_close(loss, torch.full((1, 3), -4.0))
    assert not high.any()


def test_on_policy_the_loss_is_zero_and_its_gradient_is_not():
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    mask = torch.ones(2, 2)
    advantages = grpo.group_advantages(torch.tensor([[1.0, 0.0]]), "grpo").flatten()
    loss, low, high = grpo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, 0.2)
    total = (loss * grpo.token_weights(mask, "token", 0)).sum()
    total.backward()
    assert total.item() == pytest.approx(0, abs=1e-6) and not low.any() and not high.any()
    assert logprobs.grad.abs().min() > 0.1


def test_k3_is_the_kl_in_expectation_and_finite():
    logp = torch.log(torch.tensor([0.7, 0.2, 0.1]))
    ref = torch.log(torch.tensor([0.2, 0.3, 0.5]))
    torch.testing.assert_close((logp.exp() * grpo.kl_k3(logp, ref)).sum(), (logp.exp() * (logp - ref)).sum())
    assert (grpo.kl_k3(logp, ref) >= 0).all()
    assert torch.isfinite(grpo.kl_k3(torch.tensor([-900.0, 0.0]), torch.tensor([0.0, -900.0]))).all()


def test_overlong_penalty_by_hand():
    penalty = grpo.overlong_penalty(torch.tensor([10, 15, 16, 18, 20]), limit=20, buffer=5)
    torch.testing.assert_close(penalty, torch.tensor([0, 0, -0.2, -0.6, -1.0]))


def test_pass_at_k_against_brute_force():
    right = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
    for k in range(1, 6):
        hits = [any(row[i] for i in chosen) for row in right for chosen in itertools.combinations(range(5), k)]
        assert grpo.pass_at_k(right, k) == pytest.approx(np.mean(hits))


# The exact gradient of a language that can be enumerated ----------------------------------------------

ENDS, LIMIT, GROUP = 0, 3, 3  # token 0 ends a text; texts have up to 3 tokens of 2 kinds


@pytest.fixture(scope="module")
def language():
    """Logits by state, all texts as (states, tokens), and their rewards."""
    logits = torch.tensor([[0.3, -0.2], [0.9, 0.1], [-0.5, 0.4]], dtype=torch.float64, requires_grad=True)
    texts = [[0], [1, 0], [1, 1, 0], [1, 1, 1]]
    return logits, texts, torch.tensor([0.0, 1.0, 0.3, 2.0], dtype=torch.float64)


def padded(texts):
    tokens = torch.tensor([text + [0] * (LIMIT - len(text)) for text in texts])
    return tokens, torch.tensor([[1.0] * len(text) + [0.0] * (LIMIT - len(text)) for text in texts]).double()


def logprobs_of(logits, tokens):
    return torch.log_softmax(logits, -1)[torch.arange(LIMIT), tokens]


def exact_gradient(language):
    logits, texts, rewards = language
    tokens, mask = padded(texts)
    probabilities = (logprobs_of(logits, tokens) * mask).sum(1).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    return torch.autograd.grad((probabilities * rewards).sum(), logits)[0]


def expected_gradient(language, kind, norm):
    """The mean, over all groups of answers, of minus the gradient of the loss that the script would take."""
    logits, texts, rewards = language
    tokens, mask = padded(texts)
    probabilities = (logprobs_of(logits, tokens) * mask).sum(1).exp().detach()
    total = torch.zeros_like(logits)
    for group in itertools.product(range(len(texts)), repeat=GROUP):
        group = list(group)
        logprobs = logprobs_of(logits, tokens[group])
        advantages = grpo.group_advantages(rewards[group][None], kind)[0]
        loss, _, _ = grpo.policy_loss(logprobs, logprobs.detach(), advantages, mask[group], 0.2, 0.28)
        weights = grpo.token_weights(mask[group], norm, LIMIT).double()
        total -= probabilities[group].prod() * torch.autograd.grad((loss * weights).sum(), logits)[0]
    return total


def test_leave_one_out_is_unbiased_and_dr_grpo_up_to_a_factor(language):
    exact = exact_gradient(language) / LIMIT
    torch.testing.assert_close(expected_gradient(language, "rloo", "constant"), exact, rtol=1e-6, atol=1e-9)
    dr_grpo = expected_gradient(language, "dr_grpo", "constant")
    torch.testing.assert_close(dr_grpo, exact * (GROUP - 1) / GROUP, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "kind, norm", [("grpo", "constant"), ("dr_grpo", "sequence"), ("dr_grpo", "token"), ("grpo", "sequence")]
)
def test_normalisers_bend_the_gradient(language, kind, norm):
    """Dividing by the deviation or by lengths changes the direction, not only the size; it still climbs."""
    exact, found = exact_gradient(language).flatten(), expected_gradient(language, kind, norm).flatten()
    cosine = torch.cosine_similarity(exact, found, dim=0).item()
    assert 0.5 < cosine < 0.9999


# Against TRL ------------------------------------------------------------------------------------------


def trl_loss(loss_type, level, logprobs, old, ref, advantages, mask, beta):
    """TRL's loss of fixed tensors."""
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    trainer = object.__new__(trainer_module.GRPOTrainer)
    accelerator = SimpleNamespace(
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        num_processes=1,
        device="cpu",
        sync_gradients=True,
    )
    trainer.__dict__.update(
        model=SimpleNamespace(training=True), accelerator=accelerator, loss_type=loss_type,
        importance_sampling_level=level, beta=beta, epsilon_low=0.2, epsilon_high=0.28, max_completion_length=LENGTH,
        current_gradient_accumulation_steps=1, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, aux_loss_enabled=False, _entropy_bonus_enabled=False, tools=None,
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None)
    inputs = dict(
        prompt_ids=torch.zeros(len(mask), 1, dtype=torch.long), prompt_mask=torch.ones(len(mask), 1),
        completion_ids=torch.zeros_like(mask), completion_mask=mask, advantages=advantages,
        old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum(),
    )  # fmt: skip
    return trainer._compute_loss(trainer.model, inputs)


LENGTH = 7
TRL_LOSSES = [("grpo", "token", "sequence"), ("bnpo", "token", "token"), ("dapo", "token", "token"),
              ("dr_grpo", "token", "constant"), ("grpo", "sequence", "sequence")]  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type, level, norm", TRL_LOSSES)
def test_loss_and_gradient_are_those_of_trl(loss_type, level, norm, beta):
    torch.manual_seed(0)
    logprobs = (-2 * torch.rand(6, LENGTH)).requires_grad_()
    old, ref = logprobs.detach() + 0.3 * torch.randn(6, LENGTH), logprobs.detach() + 0.3 * torch.randn(6, LENGTH)
    mask = (torch.arange(LENGTH) < torch.tensor([7, 3, 1, 5, 2, 6])[:, None]).long()
    advantages = torch.randn(6)
    theirs = trl_loss(loss_type, level, logprobs, old, ref, advantages, mask, beta)
    their_gradient = torch.autograd.grad(theirs, logprobs)[0]
    loss, _, _ = grpo.policy_loss(logprobs, old, advantages, mask, 0.2, 0.28, level)
    ours = ((loss + beta * grpo.kl_k3(logprobs, ref)) * grpo.token_weights(mask, norm, LENGTH)).sum()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(ours, logprobs)[0], their_gradient, atol=1e-6, rtol=1e-5)


# Verifiers and rewards --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [
        ("so it is 7", 7), ("-7", -7), ("the answer is −7.", -7), ("10-7", 7), ("1,234.50 dollars", Fraction("1234.5")),
        ("\\boxed{12} or 13", 12), ("#### 1,000,000", 1000000), ("$5", 5), ("7.", 7), ("0.5", Fraction("0.5")),
        ("1/2", None), ("1e5", None), ("1.2.3", None), ("no number", None), ("", None), ("x2", None), ("3, 4", 4),
        ("٣", None), ("5 apples and 6", 6),
    ],
)  # fmt: skip
def test_last_number(text, number):
    found = grpo.read_number(text)
    assert (found is None) if number is None else Fraction(found) == number


COUNTDOWN = [
    ("2*3+4", [2, 3, 4], 10, 1), ("(2+3)×4", [4, 3, 2], 20, 1), ("8 ÷ 3 * 3", [8, 3, 3], 8, 1), ("9−4", [4, 9], 5, 1),
    ("think\n5*2 = 10", [5, 2], 10, 1), ("<answer>5*2</answer> so", [5, 2], 10, 1), ("1/3+2/3", [1, 3, 2, 3], 1, 1),
    ("2**3", [2, 3], 8, 0), ("4.5*2", [4, 5, 2], 9, 0), ("99**98**97", [99, 98, 97], 1, 0), 
    ("3*7*07", [3, 7, 7], 147, 0),
    ("-7", [7], -7, 0), ("7//2", [7, 2], 3, 0), ("5*5", [5], 25, 0), ("5", [5, 2], 5, 0), ("1_0", [10], 10, 0),
    ("0x10", [16], 16, 0), ("4/(2-2)", [4, 2, 2], 0, 0), ("__import__('os')", [1], 1, 0), ("(" * 99, [1], 1, 0),
    ("1" * 5000, [1], 1, 0), ("(" * 45 + "7" + ")" * 45, [7], 7, 1), ("3 4", [3, 4], 34, 0), ("", [1], 1, 0),
    ("10 = 5*2", [5, 2], 10, 0), ("max(5,2)", [5, 2], 5, 0), ("5*2; 1", [5, 2, 1], 10, 0), ("１+1", [1, 1], 2, 0),
]  # fmt: skip


@pytest.mark.parametrize("text, numbers, target, right", COUNTDOWN)
def test_countdown(text, numbers, target, right):
    started = time.perf_counter()
    reward = grpo.load_reward("countdown")
    assert reward(prompts=[""], completions=[text], numbers=[numbers], target=[target]) == [right]
    assert time.perf_counter() - started < 1


def test_countdown_reads_exact_fractions():
    assert grpo.read_expression("1/3") == (Fraction(1, 3), Counter([1, 3]))


@pytest.mark.parametrize(
    "text, right",
    [
        ("AC B E = F D", 1), ("= F D", 1), ("= D F", 0), ("F D", 0), ("= F D = F D", 0), ("= A B = F D", 0),
        ("= F D A", 0), ("= F", 0), ("", 0), ("=", 0),
    ],
)  # fmt: skip
def test_cups(text, right):
    assert grpo.load_reward("cups")(prompts=[""], completions=[text], answer=["F D"]) == [right]


def test_problems_are_what_they_say():
    """The answer against a simulation that moves cups; held-out problems are others; slips and guesses as told."""
    rng = np.random.default_rng(0)
    train, test = ({grpo.make_problem(rng, 1, 1, out)["prompt"] for _ in range(4000)} for out in (False, True))
    assert not train & test and len(train | test) > 0.97 * 30 * 15 and 20 < len(test) < 70
    for held_out in (False, True):
        for _ in range(200):
            problem = grpo.make_problem(rng, 2, 6, held_out)
            first, second, *swaps, colon = problem["prompt"].split()
            under = {cup: ball for cup, ball in zip((first, second), (1, 2), strict=True)}
            for a, b in swaps:
                under[a], under[b] = under.get(b), under.get(a)
            places = {ball: cup for cup, ball in under.items() if ball}
            assert problem["answer"] == f"{places[1]} {places[2]}" and colon == ":" and 2 <= len(swaps) <= 6
    problems = [grpo.make_problem(rng, 2, 6) for _ in range(2000)]
    right = [
        grpo.read_cups(grpo.demonstrate(rng, problem["prompt"], share)) == problem["answer"]
        for share in (0.0, 1.0) for problem in problems
    ]  # fmt: skip
    assert np.mean(right[:2000]) == pytest.approx(1 / 30, abs=0.015)
    assert 0.75 < np.mean(right[2000:]) < 0.95


BAD_REWARDS = {
    "return [float('nan')] * len(completions)": "finite",
    "return [1.0]": "for each of",
    "return ['right'] * len(completions)": "failed",
    "raise ValueError('no idea')": "no idea",
    "return None": "failed",
}


@pytest.mark.parametrize("body", BAD_REWARDS)
def test_bad_reward_gets_one_line(body, tmp_path, capsys):
    write(tmp_path / "mine.py", "def f(prompts, completions, **columns):", f"    {body}")
    message = error_of(capsys, tmp_path, TINY, f"--reward {tmp_path}/mine.py:f")
    assert BAD_REWARDS[body] in message and "mine.py:f" in message


def test_missing_reward_gets_one_line(tmp_path, capsys):
    write(tmp_path / "mine.py", "x = 1")
    for name in ("nothing", f"{tmp_path}/mine.py:f", f"{tmp_path}/none.py:f"):
        assert name in error_of(capsys, tmp_path, TINY, f"--reward {name}")


def test_rewards_get_columns_and_none_means_cannot_tell(tmp_path):
    body = "    return [None if a == 'x' else s for a, s in zip(answer, size)]"
    write(tmp_path / "mine.py", "def f(prompts, completions, answer, size):", body)
    reward = grpo.load_reward(f"{tmp_path}/mine.py:f")
    rows = [{"prompt": "p", "ids": [1], "answer": a, "size": s} for a, s in (("x", 1), ("y", 2))]
    judged = grpo.score("f", reward, rows, ["", ""])
    assert math.isnan(judged[0]) and judged[1] == 2


# Sampling and updates ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    tokenizer, lm = grpo.new_lm()
    return tokenizer, lm


def settings(**changes):
    return grpo.Args(**(dict(num_prompts=4, group_size=4, max_completion_length=12, eval_samples=2) | changes))


def fresh_batch(args, tokenizer, lm, reward=None):
    """A batch of answers with rewards that differ."""
    torch.manual_seed(1)
    rewards = {"cups": reward or (lambda prompts, completions, **_: [len(text) % 5 for text in completions])}
    return grpo.rollout(
        args, Accelerator(cpu=True), lm, tokenizer, rewards, None, args.num_prompts, np.random.default_rng(3)
    )


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_sampling_and_scoring_agree(lm, pad_token):
    """Left-padded prompts, at another temperature: the probabilities of sampling are those of one unpadded pass."""
    tokenizer, model = copy.deepcopy(lm[0]), lm[1]
    tokenizer.pad_token = pad_token
    args = settings(temperature=0.7)
    batch = fresh_batch(args, tokenizer, model)
    assert len({len(row["ids"]) for row in batch["rows"]}) > 1 and batch["ended"].any() and not batch["ended"].all()
    for p in range(4):
        for g in range(4):
            tokens = batch["tokens"][p, g][batch["mask"][p, g] > 0]
            ids = torch.tensor([batch["rows"][p]["ids"] + tokens.tolist()])
            logprobs, entropy = grpo.token_logprobs(model, ids, torch.ones_like(ids), len(tokens), 0.7)
            torch.testing.assert_close(batch["logprobs"][p, g, : len(tokens)], logprobs[0].detach(), atol=1e-5, rtol=0)
            assert (entropy > 0).all()
            ends = tokens == tokenizer.eos_token_id
            assert ends.any().item() == batch["ended"][p, g].item() == bool(ends[-1])  # the end counts, and is last


def after_update(lm, batch, args):
    """The weights after one update of a copy with plain gradient descent."""
    model = copy.deepcopy(lm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = grpo.update(args, Accelerator(cpu=True), model, None, optimizer, batch, np.random.default_rng(0))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("extra", [{}, dict(ent_coef=0.1), dict(ratio="sequence"), dict(mask_overlong=True)])
def test_update_does_not_depend_on_how_it_is_cut(lm, norm, extra):
    tokenizer, model = lm
    args = settings(loss_norm=norm, **extra)
    batch = fresh_batch(args, tokenizer, model)
    whole, metrics = after_update(model, batch, args)
    for parts in (3, 16, 40):
        cut, cut_metrics = after_update(model, batch, settings(loss_norm=norm, gradient_accumulation=parts, **extra))
        torch.testing.assert_close(cut, whole, atol=2e-6, rtol=1e-5)
        assert cut_metrics == pytest.approx(metrics, abs=1e-5)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (whole - start).abs().max() > 1e-4 and metrics["losses/grad_norm"] > 0


def test_answers_without_advantage_are_skipped_without_effect(lm):
    """The same update when the skipping is switched off by a bonus too small to matter."""
    tokenizer, model = lm
    args = settings()
    batch = fresh_batch(args, tokenizer, model)
    batch["rewards"][:2] = 1.0
    skipped, _ = after_update(model, batch, args)
    all_rows, _ = after_update(model, batch, settings(ent_coef=1e-12))
    torch.testing.assert_close(skipped, all_rows, atol=2e-6, rtol=1e-5)
    batch["rewards"][:] = 1.0
    unmoved, metrics = after_update(model, batch, args)
    assert torch.equal(unmoved, torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert metrics["losses/grad_norm"] == 0


def test_masked_answers_do_not_pull(lm):
    """With --mask-overlong the rewards of cut answers move nothing, as long as the baseline stays."""
    tokenizer, model = lm
    args = settings(mask_overlong=True, advantage="dr_grpo")
    batch = fresh_batch(args, tokenizer, model)
    batch["ended"][:] = False
    unmoved, _ = after_update(model, batch, args)
    assert torch.equal(unmoved, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_mixed_tells_groups_with_something_to_learn():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [math.nan, 1.0, 1.0], [math.nan, 0.0, 1.0]])
    assert grpo.mixed(rewards).tolist() == [False, True, False, True]


def test_dynamic_sampling_replaces_groups_without_variance(tmp_path, monkeypatch):
    counts, real = [], grpo.rollout

    def spy(*args):
        counts.append(args[-2])
        return real(*args)

    monkeypatch.setattr(grpo, "rollout", spy)
    run = train(tmp_path, TINY, "--total-episodes 16 --dynamic-sampling 3")  # a model this young is never right
    assert counts == [4, 4, 4, 4]
    assert [int(row["step"]) for row in rows_of(run)] == [64]
    assert float(rows_of(run)[0]["objective/groups_without_variance"]) == 1


def test_dynamic_sampling_updates_on_the_new_groups(tmp_path, monkeypatch):
    made, used, rollout, update = [], [], grpo.rollout, grpo.update

    def half_dull(*args):
        batch = rollout(*args)
        batch["rewards"] = torch.arange(4.0).repeat(len(batch["rows"]), 1)
        if not made:
            batch["rewards"][1:3] = 1.0
        made.append({name: values.copy() if name == "rows" else values.clone() for name, values in batch.items()})
        return batch

    monkeypatch.setattr(grpo, "rollout", half_dull)
    monkeypatch.setattr(grpo, "update", lambda *args: used.append(args[5]) or update(*args))
    train(tmp_path, TINY, "--total-episodes 16 --dynamic-sampling 3")
    first, second = made
    [batch] = used
    for name in batch:
        expected = [first[name][0], second[name][0], second[name][1], first[name][3]]
        assert all(np.array_equal(found, row) for found, row in zip(batch[name], expected, strict=True)), name


# Runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learning(dataset):
    """Flags of a tiny run that has something to learn from."""
    return f"{TINY} --no-anneal-lr --advantage rloo --reward cups {dataset.parent}/shape.py:f"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, learning):
    """A tiny run."""
    return train(tmp_path_factory.mktemp("tiny"), learning, "--total-episodes 96")


def test_run_folder(tiny):
    summary = json.loads((tiny / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 96 and set(summary["before"]) <= set(summary)
    assert {"greedy", "pass@1", "pass@2", "length", "harder_greedy", "harder_pass@1"} <= set(summary)
    assert {"start", "policy", "samples.md", "curves.png", "model.pt"} <= {path.name for path in tiny.iterdir()}
    text = (tiny / "samples.md").read_text(encoding="utf-8")
    assert text.count("- before: ") == text.count("- after: ") == 4
    row = rows_of(tiny)[-1]
    for name in ("objective/right", "objective/well_formed", "losses/entropy", "losses/clip_high", "eval/pass@2"):
        assert row[name] != "", name


def test_one_seed_gives_one_result_and_resuming_goes_on_with_it(tiny, learning, tmp_path):
    half = train(tmp_path, learning, "--total-episodes 48")
    assert all(float(row["losses/grad_norm"]) > 0 for row in rows_of(half))
    assert rows_of(half) == rows_of(tiny)[:3] and len(rows_of(tiny)) == 6
    grpo.train(grpo.parse_args(["--resume", str(half), "--total-episodes", "96"]))
    assert rows_of(half) == rows_of(tiny)
    other = train(tmp_path, learning, "--total-episodes 48 --seed 2")
    assert rows_of(other) != rows_of(half)[:3]


def test_eval_repeats_the_result(tiny, capsys):
    summary = json.loads((tiny / "summary.json").read_text(encoding="utf-8"))
    grpo.train(grpo.parse_args(["--eval", str(tiny)]))
    assert f"greedy {summary['greedy']:.4g} · pass@1 {summary['pass@1']:.4g}" in capsys.readouterr().out


def test_settings_that_make_no_sense_get_one_line(tmp_path, capsys):
    bad = {
        "--group-size 1": "--group-size", "--temperature 0": "--temperature", "--kl-coef -1": "--kl-coef",
        "--model gpt2": "--dataset", "--reward-weights 1 2": "--reward-weights", "--lora-rank 4": "--lora-rank",
        "--max-completion-length 60": "--max-completion-length",
    }  # fmt: skip
    for flags, word in bad.items():
        assert word in error_of(capsys, tmp_path, TINY, flags), flags
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Problems as a JSONL file; their prompts are of several lengths."""
    file, rng = tmp_path_factory.mktemp("data") / "cups.jsonl", np.random.default_rng(0)
    rows = [grpo.make_problem(rng, 1, 6) for _ in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def own(tiny, dataset):
    """Flags for the tiny run's model as a model of one's own."""
    return f"{TINY} --model {tiny / 'start'} --dataset {dataset} --eval-split train --max-prompt-length 20"


@pytest.mark.parametrize("flags", ["", "--lora-rank 2 --kl-coef 0.1", "--gradient-checkpointing --bf16 --kl-coef 0.1"])
def test_model_and_dataset_of_ones_own(tiny, dataset, flags, tmp_path):
    run = train(tmp_path, own(tiny, dataset), flags, "--total-episodes 32 --learning-rate 1e-2 --advantage reinforce++",
                f"--reward cups {dataset.parent}/shape.py:f --reward-weights 1 0.5")  # fmt: skip
    kls = [float(row["losses/kl"]) for row in rows_of(run)]
    assert kls[0] == pytest.approx(0, abs=1e-5)  # the reference is the model itself
    assert kls[1] > 1e-5 if "kl" in flags else kls[1] == 0


@pytest.fixture(scope="module", autouse=True)
def shape(dataset):
    (dataset.parent / "shape.py").write_text(
        "def f(prompts, completions, answer):\n    return [len(text) % 3 for text in completions]\n", encoding="utf-8"
    )


def test_bad_data_gets_one_line(tiny, dataset, tmp_path, capsys):
    flags = own(tiny, dataset)
    assert "'prompt'" in error_of(
        capsys, tmp_path, flags, f"--dataset {write(tmp_path / 'a.csv', 'question,answer', 'a,b')}"
    )
    assert "answer" in error_of(
        capsys, tmp_path, flags, f"--dataset {write(tmp_path / 'b.csv', 'prompt,truth', 'A B :,b')}"
    )
    assert "--max-prompt-length" in error_of(capsys, tmp_path, flags, "--max-prompt-length 2")
    assert "none.csv" in error_of(capsys, tmp_path, flags, f"--dataset {tmp_path}/none.csv")
    assert "at most 64 tokens" in error_of(capsys, tmp_path, flags, "--max-completion-length 60")
    talk = json.dumps({"prompt": [{"role": "user", "content": "A B :"}], "answer": "A B"})
    assert "messages" in error_of(
        capsys, tmp_path, flags, f"--dataset {write(tmp_path / 'c.jsonl', talk)}"
    )  # no template


def test_messages_are_written_out_by_the_chat_template(lm, tmp_path):
    tokenizer, _ = lm
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    talk = json.dumps({"prompt": [{"role": "user", "content": "A B AC"}], "answer": "C B"})
    args = grpo.Args(model="x", dataset=str(write(tmp_path / "talk.jsonl", talk)))
    [row] = grpo.load_rows(args, tokenizer, "train")
    assert tokenizer.decode(row["ids"]) == "A B AC :" and row["answer"] == "C B"


def test_long_prompts_are_left_out(lm, dataset, capsys):
    args = grpo.Args(model="x", dataset=str(dataset), max_prompt_length=6)
    rows = grpo.load_rows(args, lm[0], "train")
    assert 0 < len(rows) < 40 and max(len(row["ids"]) for row in rows) == 6
    assert f"{40 - len(rows)} of 40" in capsys.readouterr().out


def test_nothing_is_learnt_where_no_answer_is_right(tmp_path):
    """A model that knows nothing yet: no group has variance, so the weights stay where the warm start left them."""
    run = train(tmp_path, "--warmup-steps 2 --total-episodes 32 --num-prompts 4 --group-size 4 --eval-episodes 4")
    assert all(float(row["objective/groups_without_variance"]) == 1 for row in rows_of(run))
    assert all(float(row["losses/grad_norm"]) == 0 for row in rows_of(run))
    start, policy = (grpo.load_lm(str(run / name))[1].state_dict() for name in ("start", "policy"))
    assert all(torch.equal(start[name], policy[name]) for name in start)


def test_it_learns_to_write_its_steps_down(tmp_path):
    run = train(
        tmp_path, "--warmup-steps 350 --total-episodes 7680 --eval-episodes 128 --eval-samples 4 --eval-every 99"
    )
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    before = summary["before"]
    assert before["pass@1"] < 0.4 and before["greedy"] < 0.4
    assert summary["pass@1"] > before["pass@1"] + 0.25 and summary["greedy"] > before["greedy"] + 0.25
    assert summary["length"] > 1.5 * before["length"]


def test_two_processes_equal_one(tiny, dataset, tmp_path):
    """Two CPU processes share each batch; one process has it whole. The weights must be the same."""
    flags = own(tiny, dataset) + f" --total-episodes 48 --learning-rate 1e-3 --reward cups {dataset.parent}/shape.py:f"
    alone = train(tmp_path / "one", flags)
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), str(ROOT / "rlhf/grpo.py")]
    command += [*flags.split(), "--run-dir", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (together,) = (tmp_path / "two").iterdir()
    one, two = (torch.load(f / "model.pt", weights_only=True)["parts"]["lm"] for f in (alone, together))
    start = grpo.load_lm(str(tiny / "start"))[1].state_dict()
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-3
    assert max((one[name] - two[name]).abs().max() for name in one) < 2e-5
    assert rows_of(alone)[0]["objective/reward"] == rows_of(together)[0]["objective/reward"]


def test_curves_join_the_points_that_were_measured(tmp_path, monkeypatch):
    """A metric of every second row is a line all the same."""
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot

    def note(axis, x, y, **style):
        drawn[axis.get_title()] = list(zip(x, y, strict=True))
        return plot(axis, x, y, **style)

    monkeypatch.setattr(Axes, "plot", note)
    train(tmp_path, TINY)
    assert [x for x, _ in drawn["eval/pass@1"]] == [32, 64] and len(drawn["objective/reward"]) == 4
    assert all(math.isfinite(y) for points in drawn.values() for _, y in points)
