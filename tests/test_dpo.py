"""Tests of rlhf/dpo.py: losses against TRL's own code, DPO by its exact optimum, data that must not vanish."""

import collections
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: a name that does not exist fails at once

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, load_script
from small_runs import interrupt_at_report
from test_rlhf_ppo import EOS, PAD, load_weights, make_folders, rows_of, tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

dpo = load_script("rlhf/dpo.py")
LOSSES = ("dpo", "cdpo", "ipo", "hinge", "kto", "orpo", "simpo")
FLAGS = (
    "--total-episodes 24 --batch-size 8 --max-completion-length 5 --eval-episodes 8 --eval-every 2 --learning-rate 1e-2"
)
SMALL = FLAGS.split()


def run(*flags: object) -> Path:
    return dpo.train(dpo.parse_args([str(flag) for flag in flags]))


def settings(**changes: object) -> dpo.Args:
    return dpo.Args(**{"max_grad_norm": 1e9, "sft_coef": 0.0, **changes})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, make_folders(folder)


@pytest.fixture(scope="module")
def small_run(folders):
    return run(*folders[1], *SMALL)


# The losses against TRL -------------------------------------------------------------------------


def fake_trainer(kind: type, **attributes: object) -> object:
    """A trainer without model or data: what its loss reads of itself, and nothing more."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), **{
        name: lambda x, *_, **__: x for name in ("gather_for_metrics", "gather", "reduce")})  # fmt: skip
    trainer = object.__new__(kind)
    common = {"accelerator": accelerator, "model": SimpleNamespace(training=True), "aux_loss_enabled": False,
              "precompute_ref_logps": True, "_total_train_tokens": 0, "_tp_size": 1, "label_smoothing": 0.0,
              "_metrics": {"train": collections.defaultdict(list)}}  # fmt: skip
    for name, value in (common | attributes).items():
        setattr(trainer, name, value)
    return trainer


def random_texts(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of tokens [rows, 9], 0 outside the responses, and the responses' mask [rows, 10]."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, 10, dtype=torch.long)
    for row in mask:
        start, length = (int(torch.randint(1, 5, (), generator=rng)) for _ in range(2))
        row[start : start + length] = 1
    return -4 * torch.rand(rows, 9, generator=rng, dtype=torch.double) * mask[:, 1:], mask


def model_of(logprobs: torch.Tensor) -> object:
    """A model, to TRL: it returns these log-probabilities whatever it reads."""
    zeros = torch.zeros_like(logprobs)
    return lambda **_: SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, log_sum_sq_probs=zeros,
                                       is_top1=zeros.bool(), aux_loss=None)  # fmt: skip


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, inputs: torch.Tensor) -> None:
    """Equal loss, and equal gradient."""
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True)[0] for loss in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_pair_losses_equal_trl(name, beta):
    trl = pytest.importorskip("trl")
    logprobs, mask = random_texts(12)
    logprobs.requires_grad_()
    ref = random_texts(12, seed=1)[0].sum(1)
    trainer = fake_trainer(trl.DPOTrainer, ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[name],
                           loss_weights=[1.0], beta=beta, use_weighting=False)  # fmt: skip
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": ref[:6], "ref_rejected_logps": ref[6:]}  # fmt: skip
    theirs = trainer._compute_loss(model_of(logprobs), inputs, False)
    logratios, counts = logprobs.sum(1) - ref, mask.sum(1)
    ours = {"sigmoid": lambda: dpo.dpo_loss(*logratios.chunk(2), beta),
            "hinge": lambda: dpo.hinge_loss(*logratios.chunk(2), beta),
            "ipo": lambda: dpo.ipo_loss(*(logratios / counts).chunk(2), beta)}[name]().mean()  # fmt: skip
    assert_same(ours, theirs, logprobs)


@pytest.mark.parametrize("good", ["11010010", "1", "0", "11111", "0000001"])
def test_kto_equals_trl_on_odd_and_unbalanced_batches(good):
    trl = pytest.importorskip("trl")
    labels, count = torch.tensor([letter == "1" for letter in good]), len(good)
    logprobs, mask = random_texts(count)
    logprobs.requires_grad_()
    ref, ref_mismatched = random_texts(count, 1)[0].sum(1), random_texts(count, 2)[0].sum(1) - 3
    mismatched, _ = random_texts(count, 3)
    trainer = fake_trainer(trl.KTOTrainer, calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=1.5,
                           undesirable_weight=0.8, _compute_kl_logps=lambda *_: mismatched.sum(1))  # fmt: skip
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask, "label": labels,
              "ref_logps": ref, "ref_KL_logps": ref_mismatched}  # fmt: skip
    theirs = trainer._compute_loss(model_of(logprobs), inputs, False)
    kl = (mismatched.sum(1) - ref_mismatched).mean().clamp(min=0)
    assert kl > 0
    assert_same(dpo.kto_loss(logprobs.sum(1) - ref, labels, kl, 0.3, 1.5, 0.8).mean(), theirs, logprobs)


def test_orpo_simpo_and_smoothing_equal_trl():
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    means = (-3 * torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) - 0.01).requires_grad_()
    theirs = -fake_trainer(ORPOTrainer, beta=0.4).odds_ratio_loss(*means)[0]
    assert_same(0.4 * dpo.orpo_loss(*means).mean(), theirs.mean(), means)
    cpo = {"alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7}
    theirs = fake_trainer(CPOTrainer, loss_type="simpo", **cpo).cpo_loss(*means)[0]
    assert_same(dpo.simpo_loss(*means, 2.0, 0.7).mean(), theirs.mean(), means)
    theirs = fake_trainer(CPOTrainer, loss_type="sigmoid", **cpo | {"label_smoothing": 0.2}).cpo_loss(*means)[0]
    assert_same(dpo.dpo_loss(*means, 2.0, 0.2).mean(), theirs.mean(), means)


def test_losses_where_policy_and_reference_agree():
    zeros = torch.zeros(4)
    assert dpo.dpo_loss(zeros, zeros, 0.3).tolist() == pytest.approx([math.log(2)] * 4)
    assert dpo.dpo_loss(zeros, zeros, 0.3, 0.1).tolist() == pytest.approx([math.log(2)] * 4)
    assert dpo.ipo_loss(zeros, zeros, 0.3).tolist() == pytest.approx([(1 / 0.6) ** 2] * 4)
    assert dpo.hinge_loss(zeros, zeros, 0.3).tolist() == [1] * 4
    good = torch.tensor([True, False, False, False])
    losses = dpo.kto_loss(zeros, good, torch.zeros(()), 0.3, 2.0, 1.0)
    assert losses.mean().item() == pytest.approx((2.0 * 1 + 1.0 * 3) / (2 * 4))


def test_certain_texts_keep_orpo_finite():
    means = torch.tensor([[0.0, -1e-9, -50.0], [-50.0, 0.0, 0.0]], requires_grad=True)
    loss = dpo.orpo_loss(*means)
    assert torch.isfinite(loss).all() and torch.isfinite(torch.autograd.grad(loss.sum(), means)[0]).all()


def test_kto_weights_balance_labels():
    good, bad = dpo.kto_weights([True] * 3 + [False] * 9, None, None)
    assert 3 * good == pytest.approx(9 * bad) and min(good, bad) == 1
    assert dpo.kto_weights([True, False], None, None) == (1, 1)
    assert dpo.kto_weights([True] * 3 + [False] * 9, 5.0, None) == (5.0, 1)
    assert all(map(math.isfinite, dpo.kto_weights([True, True], None, None)))


# Log-probabilities ------------------------------------------------------------------------------


ROWS = [([3, 4, 5, 6, EOS], 2), ([7, 8, EOS], 1), ([3, 4, 9, 9, 10, 5, 3, 8], 3), ([5, 6, 7, EOS], 3)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("group_size", [1, 2, 32])
def test_logps_do_not_depend_on_padding_and_company(kind, group_size):
    lm = tiny_lm(kind)
    for pad_id in (PAD, EOS, 9):
        logps, counts = dpo.completion_logps(lm, ROWS, pad_id, 0.8, group_size)
        assert counts.tolist() == [3, 2, 5, 1]
        for (ids, start), logp in zip(ROWS, logps, strict=True):
            full = torch.log_softmax(lm(torch.tensor([ids])).logits[0] / 0.8, -1)
            expected = sum(full[t - 1, ids[t]] for t in range(start, len(ids)))
            assert logp.item() == pytest.approx(expected.item(), abs=2e-5)


def preferences(loss: str = "dpo", texts: list | None = None, good: list | None = None) -> dpo.Preferences:
    """Pairs; for KTO single texts with their neighbours' completions."""
    rng = np.random.default_rng(0)
    if texts is None:
        texts = [([3, 4, *map(int, rng.integers(3, 11, n)), EOS], 2) for n in rng.integers(1, 7, 16)]
    data = dpo.Preferences(texts, good or [n % 2 == 0 for n in range(len(texts))], paired=loss != "kto")
    if not data.paired:
        data.mismatched = [(a[:2] + b[2:], 2) for (a, _), (b, _) in zip(texts, texts[1:] + texts[:1], strict=True)]
    return data


def one_step(loss: str, parts: int = 1, lm: object = None, data: object = None, rows: object = None, **changes: object):
    """One step of plain gradient descent; the preferences, the weights' changes and the metrics."""
    lm, data = lm or tiny_lm(vocab=11), data or preferences(loss)
    accelerator, before = Accelerator(cpu=True), torch.cat([p.detach().flatten().clone() for p in lm.parameters()])
    rows = np.arange(len(data.texts) // (2 if data.paired else 1)) if rows is None else rows
    args = settings(loss=loss, gradient_accumulation=parts, batch_size=len(rows), **changes)
    reference = tiny_lm(vocab=11, seed=1)
    data.ref_logps = dpo.reference_logps(args, accelerator, reference, PAD, data.texts)
    data.mismatched_ref_logps = dpo.reference_logps(args, accelerator, reference, PAD, data.mismatched)
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    kl = dpo.reference_point(args, accelerator, lm, PAD, data, rows)
    sums = 0.0
    for part in dpo.own_parts(args, accelerator, rows):
        total, seen = dpo.preference_loss(args, lm, PAD, data, part, kl)
        (total / len(rows)).backward()
        sums = sums + seen
    dpo.take_step(args, accelerator, optimizer)
    after = torch.cat([p.detach().flatten() for p in lm.parameters()])
    return data, after - before, dpo.summarize(args, [sums])


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_minibatch_give_the_same_step(loss):
    whole, parts = (one_step(loss, n, sft_coef=0.5) for n in (1, 4))
    assert whole[1].abs().max() > 1e-4
    torch.testing.assert_close(whole[1], parts[1], atol=1e-6, rtol=1e-4)
    assert whole[2] == pytest.approx(parts[2], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_prefers_the_chosen_text(loss):
    lm, data = tiny_lm(vocab=11), preferences(loss)
    margins = [one_step(loss, lm=lm, data=data)[2]["rewards/margins"] for _ in range(4)]
    assert margins[-1] > margins[0] + 1e-4


def test_logged_metrics_by_hand():
    lm, reference, data = tiny_lm(vocab=11), tiny_lm(vocab=11, seed=1), preferences()
    with torch.no_grad():
        logps, refs = (dpo.completion_logps(net, data.texts, PAD, 1.0)[0].double() for net in (lm, reference))
    metrics = one_step("dpo", lm=lm, data=data, beta=0.3)[2]
    rewards = 0.3 * (logps - refs)
    assert metrics["logps/chosen"] == pytest.approx(logps[::2].mean().item(), rel=1e-5)
    assert metrics["logps/rejected"] == pytest.approx(logps[1::2].mean().item(), rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(rewards[::2].mean().item(), rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(rewards[1::2].mean().item(), rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx((rewards[::2] - rewards[1::2]).mean().item(), rel=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((rewards[::2] > rewards[1::2]).double().mean().item())


def test_sft_term_is_a_mean_over_tokens_of_the_chosen_texts():
    lm, data = tiny_lm(vocab=11), preferences()
    with torch.no_grad():
        logps, counts = dpo.completion_logps(lm, data.texts, PAD, 1.0)
    expected = -(logps / counts)[::2].mean()
    losses = [one_step("dpo", lm=tiny_lm(vocab=11), sft_coef=c)[2]["losses/preference_loss"] for c in (0.0, 2.0)]
    assert losses[1] - losses[0] == pytest.approx(2 * expected.item(), rel=1e-5)
    orpo = one_step("orpo", lm=tiny_lm(vocab=11), beta=1e-9)[2]["losses/preference_loss"]
    assert orpo == pytest.approx(expected.item(), rel=1e-5)


def test_only_some_losses_have_a_reference():
    assert (one_step("dpo")[0].ref_logps != 0).all() and (one_step("simpo")[0].ref_logps == 0).all()


def test_held_out_pairs_by_hand():
    lm, data, args = tiny_lm(vocab=11), preferences(), settings(beta=0.3)
    data.ref_logps = dpo.reference_logps(args, Accelerator(cpu=True), tiny_lm(vocab=11, seed=1), PAD, data.texts)
    with torch.no_grad():
        rewards = 0.3 * (dpo.completion_logps(lm, data.texts, PAD, 1.0)[0] - data.ref_logps)
    margins = (rewards[::2] - rewards[1::2])[:5]
    assert 0 < (margins > 0).float().mean() < 1
    found = dpo.held_out(args, lm, PAD, data, 5)
    assert found["margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((margins > 0).float().mean().item())


# KTO without pairs ------------------------------------------------------------------------------


def pair_rows(count: int) -> list[dict]:
    """Rows of pairs as load_rows gives them."""
    texts = [([3, 4, 5 + n % 3, n % 8 + 3, EOS], 2) for n in range(2 * count)]
    return [{"chosen_ids": a, "rejected_ids": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]


def test_kto_tears_pairs_apart_and_mixes_prompts_with_other_completions():
    rows = pair_rows(20)
    data = dpo.load_preferences(settings(loss="kto"), rows, seed=1)
    before = [(tuple(row[f"{kind}_ids"][0]), kind == "chosen") for row in rows for kind in ("chosen", "rejected")]
    after = [(tuple(ids), good) for (ids, _), good in zip(data.texts, data.good, strict=True)]
    assert collections.Counter(after) == collections.Counter(before) and after != before
    for n, (ids, start) in enumerate(data.mismatched):
        own, (other, skip) = data.texts[n], data.texts[(n + 1) % 40]
        assert start == own[1] and ids == own[0][:start] + other[skip:]


def test_both_texts_of_a_pair_start_at_the_earlier_place():
    """Where the prompt's last letter merges with one completion's first, it is no prompt of the other either."""
    data = dpo.load_preferences(settings(), [{"chosen_ids": ([4, 5, EOS], 1), "rejected_ids": ([4, 2, 4, EOS], 2)}], 0)
    assert data.texts == [([4, 5, EOS], 1), ([4, 2, 4, EOS], 1)] and data.good == [True, False]


@pytest.mark.parametrize(
    ("labels", "meant"),
    [([True, False], [1, 0]), ([1, -1], [1, 0]), ([0.0, 1.0], [0, 1]), (["true", "False"], [1, 0]),
     (["bad", "good"], [0, 1])],
)  # fmt: skip
def test_labels_that_are_understood(labels, meant):
    rows = [{"completion_ids": ([3, 4, EOS], 1), "label": label} for label in labels]
    assert dpo.load_preferences(settings(loss="kto"), rows, 0).good == [bool(x) for x in meant]


@pytest.mark.parametrize(
    ("labels", "part"),
    [([5, 1, 3], "true/false, 1/0 or 1/-1"), ([1.0, math.nan], "has nan"),
     ([1, 0, -1], "labels of two kinds"), ([True, None], "has none")],
)  # fmt: skip
def test_labels_that_are_refused(labels, part, capsys):
    rows = [{"completion_ids": ([3, 4, EOS], 1), "label": label} for label in labels]
    with pytest.raises(SystemExit) as stop:
        dpo.load_preferences(settings(loss="kto"), rows, 0)
    assert stop.value.code == 2 and part in capsys.readouterr().err


def test_kto_reference_point_by_hand():
    lm, reference, data = tiny_lm(vocab=11), tiny_lm(vocab=11, seed=1), preferences("kto")
    args, rows, accelerator = settings(loss="kto"), np.array([0, 3, 5]), Accelerator(cpu=True)
    data.mismatched_ref_logps = dpo.reference_logps(args, accelerator, reference, PAD, data.mismatched)
    kl = dpo.reference_point(args, accelerator, lm, PAD, data, rows)
    mixed = [data.mismatched[n] for n in rows]
    with torch.no_grad():
        logps, refs = (dpo.completion_logps(net, mixed, PAD, 1.0)[0] for net in (lm, reference))
    assert kl.item() == pytest.approx(max((logps - refs).mean().item(), 0), abs=1e-5)
    assert not kl.requires_grad
    assert dpo.reference_point(args, accelerator, reference, PAD, data, rows).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("good", [True, False])
def test_a_kto_batch_of_one_label(good):
    metrics = one_step("kto", data=preferences("kto", good=[good] * 16), rows=np.arange(5))[2]
    assert (metrics["rewards/chosen"] is None, metrics["rewards/rejected"] is None) == (not good, good)
    assert metrics["rewards/margins"] is None
    assert all(math.isfinite(value) for value in metrics.values() if value is not None)


# The closed-form optimum ------------------------------------------------------------------------


def test_implicit_reward_becomes_the_true_reward():
    """All texts of up to 2 words to two prompts, all pairs with their exact probability of preference: beta times
    the log-ratio must become the reward up to a constant per prompt, and the policy pi_ref * exp(r / beta) / Z."""
    beta, words = 0.5, (3, 4, 5)
    texts = [(EOS,), *((a, EOS) for a in words), *itertools.product(words, words)]
    lm, reference = tiny_lm(vocab=6, scale=3.0), tiny_lm(vocab=6, scale=3.0)
    rewards = torch.tensor([text.count(3) - 0.7 * text.count(5) for text in texts])
    pairs = torch.tensor(list(itertools.permutations(range(len(texts)), 2)))
    probability = torch.sigmoid(rewards[pairs[:, 0]] - rewards[pairs[:, 1]])
    rows = [([prompt, *text], 1) for prompt in (3, 4) for text in texts]
    with torch.no_grad():
        refs = dpo.completion_logps(reference, rows, PAD, 1.0)[0]
    optimizer = torch.optim.Adam(lm.parameters(), lr=3e-3)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 500)
        ratios = (dpo.completion_logps(lm, rows, PAD, 1.0)[0] - refs).view(2, -1)
        losses = [(probability * dpo.dpo_loss(r[pairs[:, 0]], r[pairs[:, 1]], beta)).mean() for r in ratios]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    implicit = beta * ratios.detach()
    centred = rewards - rewards.mean()
    assert (implicit - implicit.mean(1, keepdim=True) - centred).abs().max() < 0.02 * centred.abs().max()
    best = torch.log_softmax(refs.view(2, -1) + rewards / beta, -1)  # among these texts
    reached = torch.log_softmax(ratios.detach() + refs.view(2, -1), -1)
    assert (best.exp() * (best - reached)).sum(-1).max() < 1e-3


# Whole runs -------------------------------------------------------------------------------------


def write(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


PAIRS = [{"prompt": "it is", "chosen": f" good {word}", "rejected": f" bad {word}"}
         for word in ("film", "book", "very", "is", "it", "not")]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_from_a_dataset(folders, tmp_path, loss):
    flags = [*folders[1], *SMALL, "--dataset", write(tmp_path / "pairs.jsonl", PAIRS), "--eval-split", "train"]
    flags += ["--loss", loss, "--beta", 2 if loss == "simpo" else 0.1, "--batch-size", 4]
    folder = run(*flags, "--total-episodes", 64, "--run-dir", tmp_path / "runs")
    head, *lines = [line.split(",") for line in rows_of(folder)]
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    margins = [float(row["rewards/margins"]) for row in rows if row["rewards/margins"]]
    assert margins[-1] > margins[0]
    held_out = [float(row["eval/margin"]) for row in rows if row["eval/margin"]]
    assert len(held_out) > 2 and held_out[-1] > held_out[0]
    assert json.loads((folder / "summary.json").read_text())["accuracy"] > 0.8


def test_labelled_texts_teach_kto_and_nothing_else(folders, tmp_path, capsys):
    records = [{"prompt": p["prompt"], "completion": p[name], "label": "good" if name == "chosen" else "bad"}
               for p in PAIRS for name in ("chosen", "rejected")][:9]  # fmt: skip
    flags = [*folders[1], *SMALL, "--dataset", write(tmp_path / "texts.jsonl", records), "--eval-split", "train"]
    flags += ["--run-dir", tmp_path / "runs"]
    summary = json.loads((run(*flags, "--loss", "kto") / "summary.json").read_text())
    assert summary["margin"] > 0
    assert "--loss dpo needs columns chosen and rejected" in fails(capsys, *flags, "--loss", "dpo")


def test_labels_of_one_kind_are_refused_to_learn_from_and_not_to_measure(folders, tmp_path, capsys):
    records = [
        {"prompt": "it is", "completion": f" {p['chosen'].strip()}", "label": n % 2} for n, p in enumerate(PAIRS)
    ]
    both, good = write(tmp_path / "both.jsonl", records), [record | {"label": True} for record in records]
    flags = [*folders[1], *SMALL, "--loss", "kto", "--eval-split", "train[1:2]", "--run-dir", tmp_path / "runs"]
    message = fails(capsys, *flags, "--dataset", write(tmp_path / "good.jsonl", good))
    assert "labels of two kinds" in message and not (tmp_path / "runs").exists()
    summary = json.loads((run(*flags, "--dataset", both) / "summary.json").read_text())
    assert summary["accuracy"] in (0, 1)  # one text


def test_run_leaves_a_model_and_numbers(small_run, folders):
    tokenizer = AutoTokenizer.from_pretrained(small_run / "policy")
    start, policy = (AutoModelForCausalLM.from_pretrained(path) for path in (folders[0] / "lm", small_run / "policy"))
    assert policy(**tokenizer("good film", return_tensors="pt")).logits.shape == (1, 2, 11)
    assert not torch.equal(start.lm_head.weight, policy.lm_head.weight)
    summary = json.loads((small_run / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["kl"] == pytest.approx(0, abs=1e-5) and after["kl"] != 0
    assert set(before) == set(after) >= {"gold", "gold_std", "kl", "kl_interval", "length", "distinct_2", "ended"}
    assert summary["gold_gain"] == pytest.approx((after["gold"] - before["gold"]) / before["gold_std"])
    assert 0 <= summary["accuracy"] <= 1
    samples = (small_run / "samples.md").read_text()
    assert samples.count("- before: ") == samples.count("- after: ") == 8


@pytest.mark.parametrize("count", [1, 2])
def test_interrupted_run_resumes_where_it_was(folders, small_run, count, monkeypatch):
    interrupt_at_report(dpo, monkeypatch, count, lambda: run(*folders[1], *SMALL))
    newest = max(Path(folders[0] / "runs").iterdir(), key=lambda p: p.stat().st_mtime)
    assert rows_of(run("--resume", newest)) == rows_of(small_run)


def test_saved_run_is_evaluated(small_run, capsys):
    summary = json.loads((small_run / "summary.json").read_text())
    run("--eval", small_run)
    shown = capsys.readouterr().out
    assert f"gold {summary['after']['gold']:.4g}" in shown and f"accuracy {summary['accuracy']:.4g}" in shown


def test_lora_trains_an_adapter_and_its_reference_is_the_model_without(folders, tmp_path):
    folder = run(*folders[1], *SMALL, "--lora-rank", "2", "--run-dir", tmp_path)
    saved = torch.load(folder / "model.pt", weights_only=True)["parts"]["policy"]
    assert saved and all("lora_" in name for name in saved)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-5) and abs(summary["after"]["kl"]) > 1e-4
    merged = AutoModelForCausalLM.from_pretrained(folder / "policy").transformer.h[0].attn.c_attn.weight
    start = AutoModelForCausalLM.from_pretrained(folders[0] / "lm").transformer.h[0].attn.c_attn.weight
    assert not torch.equal(merged, start)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_two_processes_equal_one(tmp_path, folders, loss):
    flags = [*folders[1], *SMALL, "--loss", loss, "--max-grad-norm", "0.5", "--learning-rate", "1e-3"]
    alone = run(*flags, "--run-dir", tmp_path / "one")
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), str(ROOT / "rlhf/dpo.py")]
    command += [*flags, "--run-dir", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (together,) = (tmp_path / "two").iterdir()
    one, two = (torch.cat([p.flatten() for p in load_weights(f / "policy").values()]) for f in (alone, together))
    assert (one - two).abs().max() < 5e-5


# Bad input --------------------------------------------------------------------------------------


def fails(capsys, *flags: object) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--dataset", "no_such_folder"], "no_such_folder"),
        (["--gold", "no_such_file.py:f"], "no_such_file.py"),
        (["--beta", "0"], "--beta must be > 0"),
        (["--label-smoothing", "0.5"], "--label-smoothing must be in [0, 0.5)"),
        (["--desirable-weight", "-1"], "--desirable-weight must be > 0"),
        (["--gradient-accumulation", "3"], "cannot be shared by 3"),
        (["--max-completion-length", "1000"], "lower --max-completion-length"),
    ],
)
def test_bad_input(folders, capsys, flags, part):
    runs = set((folders[0] / "runs").glob("*"))
    assert part in fails(capsys, *folders[1], *SMALL, *flags)
    assert set((folders[0] / "runs").glob("*")) == runs


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_missing_column_is_named(folders, tmp_path, capsys, missing):
    records = [{name: text for name, text in pair.items() if name != missing} for pair in PAIRS]
    flags = [*folders[1], *SMALL, "--dataset", write(tmp_path / "pairs.jsonl", records), "--eval-split", "train"]
    message = fails(capsys, *flags, "--run-dir", tmp_path / "runs")
    assert "needs columns chosen and rejected" in message and not (tmp_path / "runs").exists()


def test_conversations_need_a_template(folders, tmp_path, capsys):
    talk = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]
    records = [{"chosen": talk, "rejected": [talk[0], {"role": "assistant", "content": "bad"}]}]
    file = write(tmp_path / "pairs.jsonl", records)
    assert "template" in fails(capsys, *folders[1], *SMALL, "--dataset", file, "--eval-split", "train")
