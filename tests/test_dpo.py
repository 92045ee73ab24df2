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
from test_rlhf_ppo import EOS, PAD, load_weights, make_folders, rows_of, tiny_lm, tiny_tokenizer
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

dpo = load_script("rlhf/dpo.py")
LOSSES = ("dpo", "cdpo", "ipo", "hinge", "kto", "orpo", "simpo")
FLAGS = (
    "--total-episodes 24 --batch-size 8 --num-pairs 24 --response-length 5 --eval-episodes 8 --eval-every 2"
    " --prompt-words 1 --sft-batch-size 8 --reward-epochs 2 --reward-batch-size 8 --reward-learning-rate 0.1"
    " --learning-rate 1e-2"
)
SMALL = FLAGS.split()


def run(*flags: object) -> Path:
    return dpo.train(dpo.parse_args(dpo.Args, dpo.PRESETS, [str(flag) for flag in flags]))


def settings(**changes: object) -> SimpleNamespace:
    args = dpo.Args(**{"max_grad_norm": 1e9, **changes})
    args.beta = args.beta or dpo.BETAS[args.loss]
    return args


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
        logps, counts = dpo.response_logps(lm, ROWS, pad_id, 0.8, group_size)
        assert counts.tolist() == [3, 2, 5, 1]
        for (ids, start), logp in zip(ROWS, logps, strict=True):
            full = torch.log_softmax(lm(torch.tensor([ids])).logits[0] / 0.8, -1)
            expected = sum(full[t - 1, ids[t]] for t in range(start, len(ids)))
            assert logp.item() == pytest.approx(expected.item(), abs=2e-5)


def preferences(rows: list | None = None, **arrays: object) -> object:
    rng = np.random.default_rng(0)
    if rows is None:
        rows = [([3, 4, *map(int, rng.integers(3, 11, n)), EOS], 2) for n in rng.integers(1, 7, 16)]
    return dpo.Preferences(rows, [n % 2 == 0 for n in range(len(rows))], **arrays)


def one_step(loss: str, parts: int = 1, lm: object = None, data: object = None, rows: object = None, **changes: object):
    """One step of plain gradient descent; the model, the weights' changes and the metrics."""
    args = settings(loss=loss, gradient_accumulation=parts, **changes)
    lm, data = lm or tiny_lm(vocab=11), data or preferences()
    accelerator, before = Accelerator(cpu=True), torch.cat([p.detach().flatten().clone() for p in lm.parameters()])
    dpo.add_reference(args, accelerator, tiny_lm(vocab=11, seed=1), PAD, data)
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    rows = np.arange(len(data.rows) if loss == "kto" else len(data.rows) // 2) if rows is None else rows
    totals = dpo.preference_step(args, accelerator, lm, optimizer, PAD, data, rows)
    after = torch.cat([p.detach().flatten() for p in lm.parameters()])
    return data, after - before, dpo.preference_metrics(args, [totals])


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_minibatch_give_the_same_step(loss):
    whole, parts = (one_step(loss, n, sft_coef=0.5) for n in (1, 4))
    assert whole[1].abs().max() > 1e-4
    torch.testing.assert_close(whole[1], parts[1], atol=1e-6, rtol=1e-4)
    assert whole[2] == pytest.approx(parts[2], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_prefers_the_chosen_text(loss):
    lm, data = tiny_lm(vocab=11), preferences()
    margins = [one_step(loss, lm=lm, data=data)[2]["rewards/margins"] for _ in range(4)]
    assert margins[-1] > margins[0] + 1e-4


def test_logged_metrics_by_hand():
    lm, reference, data = tiny_lm(vocab=11), tiny_lm(vocab=11, seed=1), preferences()
    with torch.no_grad():
        logps, refs = (dpo.response_logps(net, data.rows, PAD, 1.0)[0].double() for net in (lm, reference))
    metrics = one_step("dpo", lm=lm, data=data, beta=0.3)[2]
    rewards = 0.3 * (logps - refs)
    assert metrics["logps/chosen"] == pytest.approx(logps[::2].mean().item(), rel=1e-5)
    assert metrics["logps/rejected"] == pytest.approx(logps[1::2].mean().item(), rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(rewards[::2].mean().item(), rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(rewards[1::2].mean().item(), rel=1e-4)
    assert metrics["rewards/margins"] == pytest.approx((rewards[::2] - rewards[1::2]).mean().item(), rel=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((rewards[::2] > rewards[1::2]).double().mean().item())


def test_sft_term_is_a_mean_over_the_chosen_tokens():
    lm, data = tiny_lm(vocab=11), preferences()
    with torch.no_grad():
        logps, counts = dpo.response_logps(lm, data.rows, PAD, 1.0)
    expected = -logps[::2].sum() / counts[::2].sum()
    losses = [one_step("dpo", lm=tiny_lm(vocab=11), sft_coef=c)[2]["losses/preference_loss"] for c in (0.0, 2.0)]
    assert losses[1] - losses[0] == pytest.approx(2 * expected.item(), rel=1e-5)
    orpo = one_step("orpo", lm=tiny_lm(vocab=11), beta=1e-9)[2]["losses/preference_loss"]
    assert orpo == pytest.approx(expected.item(), rel=1e-5)


def test_reference_free_leaves_the_reference_out():
    data = one_step("dpo", reference_free=True)[0]
    assert (data.ref_logps == 0).all()
    assert (one_step("dpo")[0].ref_logps != 0).all() and (one_step("simpo")[0].ref_logps == 0).all()


# KTO without pairs ------------------------------------------------------------------------------


def test_kto_tears_pairs_apart_and_mixes_prompts_with_other_responses():
    rows = [([3, 4, 5 + n % 3, n % 8 + 3, EOS], 2 + n % 2) for n in range(40)]
    data = one_step("kto", data=preferences(list(rows)), rows=np.arange(7))[0]
    before, after = ([(tuple(ids), good) for (ids, _), good in zip(texts, labels, strict=True)]
                     for texts, labels in ((rows, preferences(rows).good), (data.rows, data.good)))  # fmt: skip
    assert collections.Counter(after) == collections.Counter(before)
    assert data.rows != rows
    for n, (ids, start) in enumerate(data.mismatched):
        own, (other, skip) = data.rows[n], data.rows[(n + 1) % 40]
        assert start == own[1] and ids == own[0][:start] + other[skip:]


def test_kto_reference_point_by_hand():
    lm, reference, data = tiny_lm(vocab=11), tiny_lm(vocab=11, seed=1), preferences()
    args, rows = settings(loss="kto"), np.array([0, 3, 5])
    accelerator = Accelerator(cpu=True)
    dpo.add_reference(args, accelerator, reference, PAD, data)
    kl = dpo.kto_reference_point(args, accelerator, lm, PAD, data, rows)
    mixed = [data.mismatched[n] for n in rows]
    logps, refs = (dpo.response_logps(net, mixed, PAD, 1.0)[0] for net in (lm, reference))
    assert kl.item() == pytest.approx(max((logps - refs).mean().item(), 0), abs=1e-5)
    assert not kl.requires_grad
    assert dpo.kto_reference_point(args, accelerator, reference, PAD, data, rows).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("good", [True, False])
def test_kto_with_one_label_only(good):
    data = preferences()
    data.good = [good] * 16
    metrics = one_step("kto", data=data, rows=np.arange(5))[2]
    assert ("rewards/chosen" in metrics, "rewards/rejected" in metrics) == (good, not good)
    assert "rewards/margins" not in metrics and all(map(math.isfinite, metrics.values()))


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
        refs = dpo.response_logps(reference, rows, PAD, 1.0)[0]
    optimizer = torch.optim.Adam(lm.parameters(), lr=3e-3)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 500)
        ratios = (dpo.response_logps(lm, rows, PAD, 1.0)[0] - refs).view(2, -1)
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


# Data that must not vanish ----------------------------------------------------------------------


def encoded(records: list[dict], tokenizer: object = None, **changes: object) -> object:
    return dpo.encode_preferences(settings(**changes), tokenizer or tiny_tokenizer(), records)


def test_what_cannot_be_learnt_from_is_counted(capsys):
    records = [
        {"prompt": "it is", "chosen": " good film", "rejected": " bad"},
        {"prompt": "it is", "chosen": " good", "rejected": " good"},
        {"prompt": "it is", "chosen": " ", "rejected": " bad"},
        {"prompt": "it is", "chosen": " good", "rejected": ""},
        {"prompt": "it is", "chosen": " very very very very good", "rejected": " bad"},
        {"prompt": "it is", "chosen": " marvellous", "rejected": " bad"},
    ]  # fmt: skip
    data = encoded(records, max_length=6)
    tokenizer = tiny_tokenizer()
    assert [(tokenizer.decode(ids), start) for ids, start in data.rows] == [
        ("it is good film <eos>", 2), ("it is bad <eos>", 2)]  # fmt: skip
    assert data.good == [True, False]
    shown = capsys.readouterr().out
    assert "5 of 6 pairs are left out" in shown and "2 have an empty text" in shown and "1 have the same" in shown
    assert "1 are longer than the 6 tokens of --max-length" in shown and "1 have words" in shown
    with pytest.raises(SystemExit) as stop:
        encoded(records[1:3])
    assert stop.value.code == 2
    assert "none of the 2 pairs can be learnt from: 1 have the same" in capsys.readouterr().err


def test_texts_end_exactly_once_and_only_if_they_end(capsys):
    record = {"prompt": "it is", "chosen": " good <eos> <eos>", "rejected": " bad", "rejected_ended": False}
    (chosen, start), (rejected, _) = encoded([record]).rows
    assert chosen.count(EOS) == 1 and chosen[-1] == EOS and EOS not in rejected
    assert len(chosen) == 4 and len(rejected) == 3 and start == 2
    assert encoded([record], max_length=4).rows and "left out" not in capsys.readouterr().out


def test_unknown_token_that_is_the_end_token_loses_no_text():
    """As in GPT-2."""
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    assert len(encoded([{"prompt": "it is", "chosen": " good", "rejected": " bad"}], tokenizer).rows) == 2
    assert dpo.known(tokenizer, [dpo.encode(tokenizer, "", "good film", 9)[0]], "texts") == [0]


def test_texts_without_prompt_get_a_first_token():
    (chosen, start), _ = encoded([{"prompt": "", "chosen": "good film", "rejected": "bad"}]).rows
    assert chosen[0] == EOS and start == 1 and chosen.count(EOS) == 2 and len(chosen) == 4


def test_first_token_that_the_tokenizer_writes_itself_is_not_doubled():
    tokenizer = tiny_tokenizer(["good", "bad"])
    bos = tokenizer.eos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, EOS)])
    (chosen, start), _ = encoded([{"prompt": "", "chosen": "good", "rejected": "bad"}], tokenizer).rows
    assert chosen[0] == EOS and start == 1 and len(chosen) == 3  # <s> good </s>


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, of which a and b become one token."""
    vocab = {token: n for n, token in enumerate(["<pad>", "<eos>", "a", "b", "c", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def test_response_starts_where_the_tokens_part():
    record = {"prompt": "ca", "chosen": "bc", "rejected": "cc"}
    (chosen, first), (rejected, second) = encoded([record], merging_tokenizer()).rows
    assert chosen == [4, 5, 4, EOS] and rejected == [4, 2, 4, 4, EOS]  # c|ab|c and c|a|c|c
    assert first == second == 1


CHAT = """{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor -%}
{% if add_generation_prompt %}bot{% endif %}"""


def test_conversations_of_every_form():
    tokenizer = tiny_tokenizer(["user", "bot", "good", "bad", "film"])
    tokenizer.chat_template = CHAT
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "film"), ("bot", "good"), ("bot", "bad")))
    records = [
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "film", "chosen": [user, good], "rejected": [user, bad]},
    ]
    texts = [dpo.from_messages(tokenizer, record, ("chosen", "rejected")) for record in records]
    assert len({tuple(text[name] for name in ("prompt", "chosen", "rejected")) for text in texts}) == 1
    (chosen, start), (rejected, _) = encoded(texts[:1], tokenizer).rows
    assert tokenizer.decode(chosen) == "user film <eos> bot good <eos>"
    assert tokenizer.decode(rejected) == "user film <eos> bot bad <eos>" and start == 4
    longer = {"chosen": [user, good, user, bad], "rejected": [user, bad]}  # they part at the second message
    assert dpo.from_messages(tokenizer, longer, ("chosen", "rejected"))["prompt"] == texts[0]["prompt"]
    silent = {"prompt": [user], "chosen": [good], "rejected": [{"role": "bot", "content": ""}]}
    with pytest.raises(SystemExit):
        encoded([dpo.from_messages(tokenizer, silent, ("chosen", "rejected"))], tokenizer)
    single = dpo.from_messages(tokenizer, {"prompt": [user], "completion": [good]}, ("completion",))
    assert single["prompt"] == texts[0]["prompt"] and single["completion"] == texts[0]["chosen"]


def write(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


PAIRS = [{"prompt": "it is", "chosen": f" good {word}", "rejected": f" bad {word}"}
         for word in ("film", "book", "very", "is", "it", "not")]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_from_a_dataset(folders, tmp_path, loss):
    flags = [*folders[1], *SMALL, "--pairs", write(tmp_path / "pairs", PAIRS), "--loss", loss, "--sft-epochs", 0]
    folder = run(*flags, "--total-episodes", 64, "--run-dir", tmp_path / "runs")
    rows = [dict(zip(*lines, strict=True)) for lines in columns_of(folder)]
    margins = [float(row["rewards/margins"]) for row in rows if row["rewards/margins"]]
    assert margins[-1] > margins[0]
    assert not (folder / "pairs").exists()
    assert ("charts/kto_kl" in rows[-1] and bool(rows[-1]["charts/kto_kl"])) == (loss == "kto")


def columns_of(folder: Path) -> list[tuple[list[str], list[str]]]:
    head, *lines = [line.split(",") for line in rows_of(folder)]
    return [(head, line) for line in lines]


def test_labelled_texts_teach_kto_and_nothing_else(folders, tmp_path, capsys):
    records = [{"prompt": p["prompt"], "completion": p[name], "label": name == "chosen"}
               for p in PAIRS for name in ("chosen", "rejected")][:9]  # fmt: skip
    flags = [*folders[1], *SMALL, "--pairs", write(tmp_path / "texts", records), "--run-dir", tmp_path / "runs"]
    assert run(*flags, "--loss", "kto").is_dir()
    assert "no column 'chosen'" in fails(capsys, *flags, "--loss", "dpo")


def test_pairs_of_rated_texts(folders, tmp_path, capsys):
    args = dpo.parse_args(dpo.Args, dpo.PRESETS, [*folders[1], *SMALL, "--pairs", "human"])
    data, tokenizer = dpo.load_split(args.dataset, "reward"), tiny_tokenizer()
    rating = dict(zip(data["text"], data["rating"], strict=True))
    pairs = dpo.rated_preferences(args, tokenizer, data)
    assert f"{len(pairs)} of 24 pairs" in capsys.readouterr().out
    assert pairs and all(rating[p["chosen"]] > rating[p["rejected"]] and p["prompt"] == "" for p in pairs)
    args.loss = "kto"
    texts = dpo.rated_preferences(args, tokenizer, data)
    assert len(texts) == len(data) and all((rating[t["completion"]] > 0) == t["label"] for t in texts)
    assert run(*folders[1], *SMALL, "--pairs", "human", "--run-dir", tmp_path).is_dir()


# Whole runs -------------------------------------------------------------------------------------


def test_run_leaves_models_pairs_and_numbers(small_run):
    tokenizer = AutoTokenizer.from_pretrained(small_run / "policy")
    sft, policy = (AutoModelForCausalLM.from_pretrained(small_run / name) for name in ("sft", "policy"))
    assert policy(**tokenizer("good film", return_tensors="pt")).logits.shape == (1, 2, 11)
    assert not torch.equal(sft.lm_head.weight, policy.lm_head.weight)
    pairs = [json.loads(line) for line in (small_run / "pairs" / "train.jsonl").read_text().splitlines()]
    assert len(pairs) == 24
    assert all(pair["chosen_score"] >= pair["rejected_score"] for pair in pairs)
    assert len({pair["chosen_ended"] for pair in pairs}) == 2, "some texts should end and some not"
    summary = json.loads((small_run / "summary.json").read_text())
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-5) and summary["after"]["kl"] != 0
    assert set(summary["after"]) >= {"score", "judge", "vader", "kl", "length", "distinct_2", "ref_perplexity"}
    samples = (small_run / "samples.md").read_text()
    assert samples.count("- before: ") == samples.count("- after: ") == 8


def test_pairs_of_a_run_can_be_used_again(small_run, folders, tmp_path):
    again = run(*folders[1], *SMALL, "--pairs", small_run / "pairs", "--run-dir", tmp_path)
    assert rows_of(again) == rows_of(small_run)


def test_pairs_are_the_best_and_the_worst_of_what_the_model_writes(folders, small_run):
    args = dpo.parse_args(dpo.Args, dpo.PRESETS, [*folders[1], *SMALL, "--num-samples", "24"])
    tokenizer, lm = dpo.load_lm(str(small_run / "sft"))
    reward = dpo.Reward(str(small_run / "reward_model"), lm, tokenizer, -1)
    prompts = dpo.make_prompts(args, tokenizer, dpo.load_split(args.dataset, "reward"))
    pairs = dpo.sample_pairs(args, Accelerator(cpu=True), tokenizer, lm, reward, prompts)
    fewer = [json.loads(line) for line in (small_run / "pairs" / "train.jsonl").read_text().splitlines()]
    gaps = [np.mean([p["chosen_score"] - p["rejected_score"] for p in found]) for found in (pairs, fewer)]
    assert gaps[0] > gaps[1] > 0  # 24 samples spread further than fewer
    for pair, name in itertools.product(pairs, ("chosen", "rejected")):
        expected = reward.score([pair["prompt"] + pair[name]]).item()
        expected -= args.missing_eos_penalty * (not pair[f"{name}_ended"])
        assert pair[f"{name}_score"] == pytest.approx(expected, abs=1e-3)
    seen, args.missing_eos_penalty = [], 0.0
    spy = SimpleNamespace(score=lambda texts: seen.append(reward.score(texts)) or seen[-1])
    pairs = dpo.sample_pairs(args, Accelerator(cpu=True), tokenizer, lm, spy, prompts)
    for pair, row in zip(pairs, torch.cat(seen).view(-1, 24), strict=True):
        assert pair["chosen_score"] == pytest.approx(row.max().item(), abs=1e-3)
        assert pair["rejected_score"] == pytest.approx(row.min().item(), abs=1e-3)


def test_both_scripts_read_one_bag_in_one_process(small_run):
    """transformers knows one class by the name ngram_bag: that of the script imported last."""
    tokenizer, lm = dpo.load_lm(str(small_run / "sft"))
    texts = ["A warm and funny film.", "It is dull."]
    scripts = (dpo, load_script("rlhf/rlhf_ppo.py"))
    scores = [script.Reward(str(small_run / "reward_model"), lm, tokenizer, -1).score(texts) for script in scripts]
    assert torch.equal(*scores) and scores[0][0] != scores[0][1]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_interrupted_run_resumes_where_it_was(folders, small_run, stage, monkeypatch):
    count = {"sft": 1, "reward": 2, "dpo": 3}[stage]
    interrupt_at_report(dpo, monkeypatch, count, lambda: run(*folders[1], *SMALL))
    newest = max(Path(folders[0] / "runs").iterdir(), key=lambda p: p.stat().st_mtime)
    assert torch.load(newest / "model.pt", weights_only=True)["stage"] == stage
    assert rows_of(run("--resume", newest)) == rows_of(small_run)


def test_saved_run_is_evaluated(small_run, capsys):
    summary = json.loads((small_run / "summary.json").read_text())
    dpo.evaluate_saved(dpo.parse_args(dpo.Args, dpo.PRESETS, ["--eval", str(small_run)]))
    shown = f"score {summary['before']['score']:.2f} → {summary['after']['score']:.2f} judge"
    assert shown in capsys.readouterr().out


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
    assert (alone / "pairs/train.jsonl").read_text() == (together / "pairs/train.jsonl").read_text()
    for name in ("sft", "policy", "reward_model"):
        one, two = (torch.cat([p.flatten() for p in load_weights(f / name).values()]) for f in (alone, together))
        assert (one - two).abs().max() < 5e-5, name


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
        (["--pairs", "no_such_folder"], "no_such_folder"),
        (["--loss", "ppo"], "--loss"),
        (["--beta", "0"], "--beta must be positive"),
        (["--label-smoothing", "0.5"], "--label-smoothing must lie in [0, 0.5)"),
        (["--desirable-weight", "-1"], "--desirable-weight must be positive"),
        (["--num-samples", "1"], "--num-samples must be at least 2"),
        (["--gradient-accumulation", "3"], "cannot be shared by 3"),
    ],
)
def test_bad_input(folders, capsys, flags, part):
    assert part in fails(capsys, *folders[1], *SMALL, *flags)


@pytest.mark.parametrize("missing", ["prompt", "chosen", "rejected"])
def test_missing_column_is_named(folders, tmp_path, capsys, missing):
    records = [{name: text for name, text in pair.items() if name != missing} for pair in PAIRS]
    flags = [*folders[1], *SMALL, "--pairs", write(tmp_path / "pairs", records), "--run-dir", tmp_path / "runs"]
    message = fails(capsys, *flags)
    assert f"no column '{missing}'" in message
    assert all(name in message for name in {"prompt", "chosen", "rejected"} - {missing})
    assert not (tmp_path / "runs").exists()


def test_conversations_need_a_template(folders, tmp_path, capsys):
    talk = [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]
    records = [{"chosen": talk, "rejected": [talk[0], {"role": "assistant", "content": "bad"}]}]
    assert "template" in fails(capsys, *folders[1], *SMALL, "--pairs", write(tmp_path / "pairs", records))
