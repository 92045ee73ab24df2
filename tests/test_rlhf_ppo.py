"""Tests of rlhf/rlhf_ppo.py: formulas by definition, log-probabilities by generation, PPO by its exact optimum."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: a name that does not exist fails at once

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, load_script
from small_runs import interrupt_at_report
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

rlhf = load_script("rlhf/rlhf_ppo.py")
PAD, EOS = 0, 1
WORDS = ["good", "bad", "film", "book", "very", "not", "is", "it"]


def tiny_lm(kind: str = "gpt2", vocab: int = 12, seed: int = 0, scale: float = 5.0, width: int = 16) -> torch.nn.Module:
    """A random language model whose distributions are far from uniform (scale multiplies the embedding)."""
    torch.manual_seed(seed)
    common = dict(vocab_size=vocab, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD)
    if kind == "gpt2":
        config = GPT2Config(
            n_positions=64, n_embd=width, n_layer=2, n_head=2, resid_pdrop=0.3, embd_pdrop=0.3, **common
        )
        lm = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            **common,
        )
        lm = LlamaForCausalLM(config)
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(scale)
        if kind == "gpt2":
            lm.transformer.wpe.weight.mul_(20)  # so that a wrong position shows
    return lm.eval()


def tiny_tokenizer(words: list[str] = WORDS, pad: bool = True) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_folders(folder: Path, words: list[str] = WORDS, rows: list[dict] | None = None, **lm) -> list[str]:
    """A model folder and a dataset folder, as flags; the texts are good with "good" and bad with "bad"."""
    tiny_lm(vocab=3 + len(words), **lm).save_pretrained(folder / "lm")
    tiny_tokenizer(words).save_pretrained(folder / "lm")
    if rows is None:
        rng, rows = np.random.default_rng(0), []
        for i in range(120):
            words = [["good", "bad"][i % 2], *rng.choice(["film", "book", "very", "is", "it"], 4)]
            votes = [int(v) for v in rng.integers(1, 4, 3)] if i % 2 == 0 else [int(v) for v in rng.integers(-3, 0, 3)]
            text = " ".join(rng.permutation(words))
            rows.append({"text": text, "rating": sum(votes) / 3, "ratings": votes})
    (folder / "data").mkdir()
    for n, split in enumerate(("reward", "judge", "heldout")):
        lines = rows[n::3] if len(rows) >= 30 else rows
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    files = "".join(f"      - split: {s}\n        path: {s}.jsonl\n" for s in ("reward", "judge", "heldout"))
    (folder / "data" / "README.md").write_text(
        f"---\nconfigs:\n  - config_name: default\n    data_files:\n{files}---\n"
    )
    return ["--model", str(folder / "lm"), "--dataset", str(folder / "data"), "--run-dir", str(folder / "runs")]


SMALL = [
    *(
        "--total-episodes",
        "16",
        "--batch-size",
        "8",
        "--response-length",
        "5",
        "--eval-episodes",
        "8",
        "--eval-every",
        "1",
    ),
    *("--prompt-words", "1", "--sft-batch-size", "8", "--reward-epochs", "2", "--reward-batch-size", "8"),
    *("--reward-learning-rate", "0.1"),
]


def run(*flags: str) -> Path:
    return rlhf.train(rlhf.parse_args(rlhf.Args, rlhf.PRESETS, list(flags)))


def rows_of(folder: Path) -> list[str]:
    """metrics.csv without the columns of the clock."""
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    keep = [i for i, name in enumerate(lines[0]) if name not in ("seconds", "charts/SPS")]
    return [",".join(line[i] for i in keep) for line in lines]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, make_folders(folder)


@pytest.fixture(scope="module")
def small_run(folders):
    return run(*folders[1], *SMALL)


def padded_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    return rlhf.pad([[3, 4], [5, 6, 7, 8], [9]], PAD, "left")


def stretch(mask: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat((mask, torch.ones(len(mask), length, dtype=mask.dtype)), 1)


# Log-probabilities and sampling -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_and_teacher_forcing_agree_on_left_padded_prompts(kind, temperature):
    lm, (ids, mask) = tiny_lm(kind), padded_prompts()
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(3))
    tokens, response, logprobs = rlhf.sample(lm, ids, mask, uniforms, EOS, PAD, temperature)
    full, full_mask = torch.cat((ids, tokens), 1), torch.cat((mask, response), 1)
    forced, _ = rlhf.token_logprobs(lm, full, full_mask, 12, temperature)
    assert ((forced - logprobs) * response).abs().max() < 1e-5
    assert len({int(n) for n in response.sum(1)}) > 1, "texts should end at different times, or the test shows little"
    for i in range(3):  # alone and without padding, every text has the same log-probabilities
        text = full[i][full_mask[i].bool()].unsqueeze(0)
        count = int(response[i].sum())
        alone, _ = rlhf.token_logprobs(lm, text, torch.ones_like(text), count, temperature)
        torch.testing.assert_close(alone[0], forced[i, :count], atol=2e-6, rtol=0)


def test_sampled_tokens_follow_the_distribution():
    lm, ids = tiny_lm(vocab=6), torch.tensor([[3, 4]])
    uniforms = (torch.arange(20_000).view(-1, 1) + 0.5) / 20_000  # a grid, so that counts are exact up to rounding
    many = ids.expand(20_000, 2)
    tokens, _, _ = rlhf.sample(lm, many, torch.ones_like(many), uniforms, EOS, PAD, 0.7)
    expected = torch.softmax(lm(ids).logits[0, -1] / 0.7, -1)
    share = torch.bincount(tokens[:, 0], minlength=6) / 20_000
    torch.testing.assert_close(share, expected, atol=1e-4, rtol=0)


def test_a_text_keeps_its_end_token_also_where_padding_is_the_same_token():
    lm = tiny_lm()
    with torch.no_grad():
        lm.lm_head.weight[EOS] += lm.lm_head.weight.abs().max()  # end tokens are common
    ids, mask = rlhf.pad([[3, 4]] * 64, EOS, "left")
    uniforms = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    separate = rlhf.sample(lm, ids, mask, uniforms, EOS, PAD, 1.0)
    same = rlhf.sample(lm, ids, mask, uniforms, EOS, EOS, 1.0)
    assert torch.equal(separate[1], same[1]) and torch.equal(separate[2], same[2])
    tokens, response, _ = same
    lengths = response.sum(1)
    assert (lengths < 8).any()
    for row, length in zip(tokens, lengths, strict=True):
        assert (row[: length - 1] != EOS).all() and (length == 8 or row[length - 1] == EOS)


def test_tokens_after_the_end_never_matter():
    lm, (ids, mask) = tiny_lm(), padded_prompts()
    agent = rlhf.ActorCritic(lm)
    torch.nn.init.normal_(agent.value_head.weight)
    response = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    full_mask = torch.cat((mask, response), 1)
    outputs = []
    for filler in (PAD, EOS, 9):
        tokens = torch.tensor([[5, 1, 0, 0], [3, 4, 5, 6], [1, 0, 0, 0]]).masked_fill(response == 0, filler)
        logprobs, values = agent(torch.cat((ids, tokens), 1), full_mask, 4, 1.0)
        batch = {"response_mask": response, "logprobs": logprobs, "values": values, "ref_logprobs": logprobs - 1,
                 "scores": torch.ones(3), "ended": torch.ones(3)}  # fmt: skip
        rlhf.add_advantages(rlhf.Args(), batch, 0.1)
        loss = rlhf.ppo_loss(logprobs, logprobs.detach(), batch["advantages"], response, 0.2)[0]
        loss = loss + rlhf.value_loss(values, values.detach() + 1, batch["returns"], response, 0.2)
        gradient = torch.autograd.grad(loss, lm.transformer.h[0].attn.c_attn.weight)[0]
        outputs.append((batch["advantages"], batch["returns"] * response, gradient))
    for output in outputs[1:]:
        for x, y in zip(outputs[0], output, strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_hidden_states_are_those_the_output_layer_sees():
    for kind in ("gpt2", "llama"):
        lm, (ids, mask) = tiny_lm(kind), padded_prompts()
        _, hidden = rlhf.token_logprobs(lm, ids, mask, 2, 1.0)
        base = lm.base_model(input_ids=ids, attention_mask=mask, position_ids=rlhf.positions(mask)).last_hidden_state
        torch.testing.assert_close(hidden, base[:, -3:-1])


# The mathematics --------------------------------------------------------------------------------


def test_kl_estimators_by_enumeration():
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * rlhf.kl_estimate(p.log(), q.log(), estimator)).sum(), exact)
    assert (rlhf.kl_estimate(p.log(), q.log(), "k3") >= 0).all()
    extreme = torch.tensor([0.0, -1000.0]), torch.tensor([-1000.0, 0.0])
    assert torch.isfinite(rlhf.kl_estimate(*extreme, "k3")).all()


def test_k1_in_the_reward_has_the_exact_gradient_of_the_kl():
    logits, q = torch.tensor([0.5, -0.3, 0.1], requires_grad=True), torch.tensor([0.2, 0.3, 0.5])
    exact = torch.autograd.grad((torch.softmax(logits, 0) * (torch.log_softmax(logits, 0) - q.log())).sum(), logits)[0]
    logp = torch.log_softmax(logits, 0)
    reward = -rlhf.kl_estimate(logp.detach(), q.log(), "k1")
    policy_gradient = torch.autograd.grad((logp.exp().detach() * reward * logp).sum(), logits)[0]
    torch.testing.assert_close(policy_gradient, -exact)


def test_gae_by_its_definition_and_without_padding():
    rng = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 5, generator=rng), torch.randn(3, 5, generator=rng)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    advantages = rlhf.gae(rewards, values, mask, 0.9, 0.8)
    for i in range(3):
        n = int(mask[i].sum())
        v = [*values[i, :n].tolist(), 0.0]  # the response ends: nothing is left to gain
        deltas = [rewards[i, t].item() + 0.9 * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((0.9 * 0.8) ** (k - t) * deltas[k] for k in range(t, n))
            assert advantages[i, t].item() == pytest.approx(expected, abs=1e-5)
        assert (advantages[i, n:] == 0).all()


def test_whitening_counts_real_tokens_only():
    x, mask = torch.randn(4, 6), torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] + [0] * 5, [1] * 4 + [0] * 2])
    x[mask == 0] = 1e4
    flat = torch.cat([row[m.bool()] for row, m in zip(x, mask, strict=True)])
    white = rlhf.whiten(x, mask)
    torch.testing.assert_close(white[mask.bool()], (flat - flat.mean()) / flat.std(), atol=1e-5, rtol=1e-5)
    assert (white[mask == 0] == 0).all()


def test_the_score_stands_on_the_last_token():
    mask, kl = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.full((2, 3), 2.0)
    rewards = rlhf.token_rewards(torch.tensor([10.0, 20.0]), kl, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.2, -0.2, 9.8], [19.8, 0, 0]]))


def test_ppo_loss_by_hand_and_extreme_ratios_stay_finite():
    old, advantages = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, 5.0]])
    new = torch.tensor([[1.5, 0.9, 1.5, 9.0]]).log()
    mask = torch.tensor([[1, 1, 1, 0]])
    loss, kl, clipped = rlhf.ppo_loss(new, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-(1.2 + 0.9 - 1.5))
    assert kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.9, 1.5)), rel=1e-5)
    assert clipped.item() == 2
    wild = torch.tensor([[1e4, -1e4, 0.0, math.inf]], requires_grad=True)
    loss = rlhf.ppo_loss(wild, old, advantages, mask, 0.2)[0]
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, wild)[0]).all()


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2)
    mask = torch.tensor([[1, 1]])
    assert rlhf.value_loss(values, old, returns, mask, None).item() == pytest.approx(0.5 * (1 + 1))
    assert rlhf.value_loss(values * 0.75, old, returns, mask, 0.2).item() == pytest.approx(0.5 * (0.8**2 + 1))


def test_adaptive_controller_moves_towards_its_target():
    assert rlhf.adapt_kl_coef(0.1, 6.0, 5.0, 64, 640) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert rlhf.adapt_kl_coef(0.1, 50.0, 5.0, 64, 640) == pytest.approx(0.1 * (1 + 0.2 * 0.1))  # limited to 20 %
    assert rlhf.adapt_kl_coef(0.1, 0.0, 5.0, 64, 640) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert rlhf.adapt_kl_coef(0.1, 5.0, 5.0, 64, 640) == pytest.approx(0.1)


def test_preferences_by_counting_votes():
    votes = [[-1, 2, 2], [2, 0], [3]]
    shares = rlhf.vote_shares(rlhf.Args(), FakeData(ratings=votes))
    for i, j in itertools.permutations(range(3), 2):
        counted = np.mean([(a > b) + 0.5 * (a == b) for a in votes[i] for b in votes[j]])
        assert rlhf.preference(shares[[i]], shares[[j]])[0] == pytest.approx(counted)


class FakeData(dict):
    column_names = property(lambda self: list(self))


def test_bradley_terry_loss_by_hand():
    loss = rlhf.pair_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.25]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(2), rel=1e-6)


def test_distinct_2_by_hand():
    assert rlhf.distinct_2(["a b a b", "a c"]) == pytest.approx(3 / 4)
    texts = ["a b"] * 128 + [f"{i} x" for i in range(128)]
    assert rlhf.distinct_2(texts) == pytest.approx((1 / 128 + 1) / 2)


def test_texts_end_once_and_too_long_ones_do_not_end():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("good film")["input_ids"]
    assert rlhf.encode(tokenizer, "", "good film", 10) == (ids + [EOS], 0)
    assert rlhf.encode(tokenizer, "", "good film <eos> <eos>", 10) == (ids + [EOS], 0)
    assert rlhf.encode(tokenizer, "good", " film", 10) == (ids + [EOS], 1)
    assert rlhf.encode(tokenizer, "", "good film", 2) == (ids, 0)


def test_sft_loss_masks_prompts_and_padding_and_keeps_the_end():
    lm = tiny_lm()
    rows = [([3, 4, 5, EOS], 2), ([6, 7, EOS], 0)]
    loss = rlhf.sft_loss(lm, rows, PAD, np.array([0, 1])).item()
    expected = 0.0
    for ids, first in (([3, 4, 5, EOS], 2), ([6, 7, EOS], 1)):
        logp = torch.log_softmax(lm(torch.tensor([ids])).logits[0], -1)
        expected -= sum(logp[t - 1, ids[t]].item() for t in range(first, len(ids)))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert rlhf.sft_tokens(rows, np.array([0, 1])) == 4


# One iteration ----------------------------------------------------------------------------------


def one_rollout(args: rlhf.Args, agent: torch.nn.Module, reference: torch.nn.Module, accelerator: Accelerator) -> dict:
    reward = rlhf.Reward("bag", agent.policy, tiny_tokenizer(), -1)
    torch.nn.init.normal_(reward.net.weights.weight)
    prompts = [[3 + i % 8, 4, *[5] * (i % 3)] for i in range(8)]
    uniforms = np.random.default_rng(0).random((8, args.response_length), np.float32)
    batch = rlhf.rollout(args, accelerator, tiny_tokenizer(), agent, reference, reward, prompts, uniforms)
    rlhf.add_advantages(args, batch, args.kl_coef)
    return batch


def test_first_ratio_is_one_and_first_kl_zero_and_the_reference_stays():
    args, accelerator = rlhf.Args(response_length=6, num_minibatches=1, update_epochs=1), Accelerator(cpu=True)
    lm, reference = tiny_lm(vocab=11), tiny_lm(vocab=11)
    agent = rlhf.ActorCritic(lm)
    batch = one_rollout(args, agent, reference, accelerator)
    assert (batch["kl"] == 0).all()
    assert (batch["values"] == 0).all()
    before = [p.clone() for p in reference.parameters()]
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    first = rlhf.ppo_update(args, accelerator, agent, optimizer, batch, np.random.default_rng(0))
    assert abs(first["losses/approx_kl"]) < 1e-10 and first["losses/clipfrac"] == 0
    second = rlhf.ppo_update(args, accelerator, agent, optimizer, batch, np.random.default_rng(0))
    assert second["losses/approx_kl"] > 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(parts):
    accelerator, weights = Accelerator(cpu=True), []
    for accumulation in (1, parts):
        args = rlhf.Args(response_length=6, num_minibatches=1, gradient_accumulation=accumulation)
        agent = rlhf.ActorCritic(tiny_lm(vocab=11))
        batch = one_rollout(args, agent, tiny_lm(vocab=11, seed=1), accelerator)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
        rlhf.ppo_update(args, accelerator, agent, optimizer, batch, np.random.default_rng(0))
        weights.append(torch.cat([p.detach().flatten() for p in agent.parameters()]))
    assert batch["response_mask"].sum(1).unique().numel() > 1, "equally long texts would hide a mean of means"
    start = torch.cat([p.detach().flatten() for p in rlhf.ActorCritic(tiny_lm(vocab=11)).parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


def test_missing_end_costs_its_penalty():
    args = rlhf.Args(reward_shaping="none", missing_eos_penalty=3.0)
    batch = {
        "response_mask": torch.ones(2, 2).long(),
        "scores": torch.tensor([5.0, 5.0]),
        "ended": torch.tensor([1.0, 0.0]),
    }
    batch |= {name: torch.zeros(2, 2) for name in ("logprobs", "ref_logprobs", "values")}
    rlhf.add_advantages(args, batch, 0.1)
    assert batch["rewards"].tolist() == [[0, 5], [0, 2]]
    batch["response_mask"] = torch.tensor([[1, 1], [1, 0]])
    rlhf.add_advantages(args, batch, 0.1, token_bonus=0.5)
    assert batch["rewards"].tolist() == [[0.5, 5.5], [2.5, 0]]


def test_heads_start_as_the_papers_say():
    agent = rlhf.ActorCritic(tiny_lm())
    assert (agent.value_head.weight == 0).all() and (agent.value_head.bias == 0).all()
    torch.manual_seed(0)
    reward = rlhf.Reward("lm", tiny_lm(width=512), tiny_tokenizer(), -1)
    assert reward.net.score.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert reward.net.score.bias is None


def test_reward_is_read_at_the_end_token_also_where_it_is_the_pad_token():
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    reward = rlhf.Reward("lm", tiny_lm(vocab=11), tokenizer, -1)
    scores = reward(["good film", "very bad book is it"])
    for text, score in zip(["good film", "very bad book is it"], scores, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"] + [EOS]])
        hidden = reward.net.base_model(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(score, reward.net.score(hidden)[0], atol=1e-6, rtol=0)


def test_bag_scores_do_not_depend_on_the_batch_and_use_word_order():
    bag = rlhf.NGramBag(rlhf.NGramBagConfig())
    torch.nn.init.normal_(bag.weights.weight)
    together = bag(["good film", "film good", "it is"])
    torch.testing.assert_close(together[1:2], bag(["film good"]))
    assert (together[0] - together[1]).abs() > 1e-3


# One update against TRL -------------------------------------------------------------------------


def test_one_update_equals_trl():
    """Policy and value weights after three epochs of TRL 1.12.0's PPOTrainer; see golden/make_trl_ppo.py."""
    golden = np.load(Path(__file__).parent / "golden" / "trl_ppo.npz")
    setup = json.loads(str(golden["setup"]))
    config = GPT2Config(**setup["config"])
    policy, reference = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()

    def weights(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in golden.items() if k.startswith(prefix)}

    policy.load_state_dict(weights("policy_before/"))
    reference.load_state_dict(weights("reference/"))
    agent = rlhf.ActorCritic(policy, separate_value=True)
    agent.critic.load_state_dict(weights("value_before/"))
    agent.value_head.weight.data = torch.from_numpy(golden["value_head_before"])
    agent.value_head.bias.requires_grad_(False)  # TRL's has none

    args = rlhf.Args(**setup["args"])
    ids, mask = torch.from_numpy(golden["ids"]), torch.from_numpy(golden["mask"])
    response = mask[:, -args.response_length :]
    with torch.no_grad():
        logprobs, values = agent(ids, mask, args.response_length, args.temperature)
        ref_logprobs, _ = rlhf.token_logprobs(reference, ids, mask, args.response_length, args.temperature)
    batch = {"ids": ids, "mask": mask, "response_mask": response, "logprobs": logprobs, "values": values}
    batch |= {"ref_logprobs": ref_logprobs, "scores": torch.from_numpy(golden["scores"]), "ended": torch.ones(len(ids))}
    rlhf.add_advantages(args, batch, args.kl_coef)
    np.testing.assert_allclose(batch["kl"].sum(1).mean(), golden["kl"], atol=1e-5)

    class Shuffles:  # TRL's own
        orders = iter(golden["permutations"])

        def permutation(self, count: int) -> np.ndarray:
            return next(self.orders)

    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, eps=1e-6)
    rlhf.ppo_update(args, Accelerator(cpu=True), agent, optimizer, batch, Shuffles())
    moved = 0.0
    for prefix, module in (("policy_after/", agent.policy), ("value_after/", agent.critic)):
        state = module.state_dict()
        for name, value in weights(prefix).items():
            assert (state[name] - value).abs().max() < 1e-5, name
            moved = max(
                moved, float((value - torch.from_numpy(golden[prefix.replace("after", "before") + name])).abs().max())
            )
    assert moved > 1e-3
    assert np.abs(agent.value_head.weight.detach().numpy() - golden["value_head_after"]).max() < 1e-5


# The closed-form optimum ------------------------------------------------------------------------


def test_ppo_reaches_the_closed_form_optimum(tmp_path):
    """Every text of up to 3 tokens is enumerated, so pi* ~ pi_ref * exp(r / beta) and J(pi*) are exact."""
    words, beta = ["a", "b", "c"], 0.3
    (tmp_path / "score.py").write_text(
        "def score(texts):\n    return [t.split()[1:].count('a') - 0.7 * t.split()[1:].count('c') for t in texts]\n"
    )
    flags = make_folders(tmp_path, words, rows=[{"text": "a b c"}] * 4, scale=3.0)
    settings = f"""--reward-model {tmp_path / "score.py"}:score --judge-split None --sft-epochs 0 --eval-every 1000
        --no-normalize-reward --no-keep-length --reward-shaping none --missing-eos-penalty 0 --kl-coef {beta}
        --response-length 3 --prompt-words 1 --batch-size 128 --total-episodes 12800 --learning-rate 3e-3
        --update-epochs 3 --num-minibatches 2 --eval-episodes 2"""
    folder = run(*flags, *settings.split())
    vocab = range(6)  # pad and unknown may be written as well: to the model they are tokens like others
    ends = []
    for n in (1, 2, 3):
        for text in itertools.product(vocab, repeat=n):
            if EOS not in text[:-1] and (n == 3 or text[-1] == EOS):
                ends.append(text)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompt = tokenizer("a")["input_ids"]

    def exact(path: Path) -> torch.Tensor:
        lm, logp = AutoModelForCausalLM.from_pretrained(path), []
        for text in ends:
            ids = torch.tensor([[*prompt, *text]])
            with torch.no_grad():
                logp.append(rlhf.token_logprobs(lm.eval(), ids, torch.ones_like(ids), len(text), 1.0)[0].double().sum())
        return torch.stack(logp)

    rewards = torch.tensor([t.count(3) - 0.7 * t.count(5) for t in ends], dtype=torch.double)
    log_ref, log_pi = exact(folder / "sft"), exact(folder / "policy")
    assert log_ref.exp().sum().item() == pytest.approx(1, abs=1e-5)
    best = beta * torch.logsumexp(log_ref + rewards / beta, 0)  # J(pi*) = beta log Z
    reached = (log_pi.exp() * (rewards - beta * (log_pi - log_ref))).sum()
    start = (log_ref.exp() * rewards).sum()
    assert best > start + 0.5
    assert reached / best >= 0.95 and (reached - start) / (best - start) >= 0.95, (start, reached, best)


# Whole runs -------------------------------------------------------------------------------------


def test_run_leaves_models_that_transformers_loads(small_run):
    tokenizer = AutoTokenizer.from_pretrained(small_run / "policy")
    for name in ("sft", "policy"):
        lm = AutoModelForCausalLM.from_pretrained(small_run / name)
        assert lm(**tokenizer("good film", return_tensors="pt")).logits.shape == (1, 2, 11)
    sft, policy = (AutoModelForCausalLM.from_pretrained(small_run / name).lm_head.weight for name in ("sft", "policy"))
    assert not torch.equal(sft, policy)
    saved = torch.load(small_run / "model.pt", weights_only=True)["networks"]
    assert torch.equal(sft, saved["reference"]["lm_head.weight"]) and torch.equal(
        policy, saved["agent"]["policy.lm_head.weight"]
    )
    bag = AutoModelForSequenceClassification.from_pretrained(small_run / "reward_model")
    reward = rlhf.Reward(str(small_run / "reward_model"), tiny_lm(), tokenizer, -1)
    assert reward.std.item() == pytest.approx(bag.config.reward_std) and reward.std > 0 and reward.std != 1
    torch.testing.assert_close(reward.net.weights.weight, saved["reward"]["net.weights.weight"])


def test_summary_samples_and_columns(small_run):
    summary = json.loads((small_run / "summary.json").read_text())
    assert summary["reward_accuracy"] > 0.8 and 0 <= summary["reward_calibration"] <= 1
    before, after = summary["before"], summary["after"]
    assert before["kl"] == pytest.approx(0, abs=1e-5) and after["kl"] != 0
    assert (
        set(before)
        == set(after)
        >= {"score", "judge", "vader", "kl_interval", "length", "distinct_2", "ref_perplexity"}
    )
    samples = (small_run / "samples.md").read_text()
    assert samples.count("- before: ") == samples.count("- after: ") == 8
    rows = (small_run / "metrics.csv").read_text().splitlines()
    assert len({row.count(",") for row in rows}) == 1
    assert rows[-1].split(",")[0] == str(2 * 40 // 2 + 2 * 40 + 16)  # SFT texts, rated texts, episodes


def test_transformer_as_reward_reads_the_beginning_of_a_long_text():
    lm, tokenizer = tiny_lm(), tiny_tokenizer(["good", "bad"])
    reward, room = rlhf.Reward("lm", lm, tokenizer, -1), lm.config.max_position_embeddings
    text = " ".join(["good"] * (3 * room))
    long, other = reward([text, text + " bad"])
    assert long.item() == other.item() != reward(["good bad"]).item()


def test_reward_model_of_people_is_learnt(folders):
    folder = run(*folders[1], *SMALL, "--total-episodes", "0", "--reward-model", "lm", "--reward-learning-rate", "3e-3",
                 "--reward-epochs", "15")  # fmt: skip
    assert json.loads((folder / "summary.json").read_text())["reward_accuracy"] > 0.85


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_interrupted_run_resumes_where_it_was(folders, small_run, stage, monkeypatch):
    count = {"sft": 1, "reward": 2, "ppo": 3}[stage]
    interrupt_at_report(rlhf, monkeypatch, count, lambda: run(*folders[1], *SMALL))
    newest = max(Path(folders[0] / "runs").iterdir(), key=lambda p: p.stat().st_mtime)
    assert torch.load(newest / "model.pt", weights_only=True)["stage"] == stage
    assert rows_of(run("--resume", str(newest))) == rows_of(small_run)


def test_saved_run_is_evaluated(small_run, capsys):
    summary = json.loads((small_run / "summary.json").read_text())
    rlhf.evaluate_saved(rlhf.parse_args(rlhf.Args, rlhf.PRESETS, ["--eval", str(small_run)]))
    shown = f"score {summary['before']['score']:.2f} → {summary['after']['score']:.2f} judge"
    assert shown in capsys.readouterr().out


def test_two_processes_equal_one(tmp_path, folders):
    """Two CPU processes share each batch; one process has it whole. The weights must be the same."""
    flags = [*folders[1], *SMALL, "--max-grad-norm", "0.5"]
    alone = run(*flags, "--run-dir", str(tmp_path / "one"))
    launch = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), str(ROOT / "rlhf/rlhf_ppo.py")]
    command += [*flags, "--run-dir", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (together,) = (tmp_path / "two").iterdir()
    for name in ("sft", "policy", "reward_model"):
        one, two = (torch.cat([p.flatten() for p in load_weights(f / name).values()]) for f in (alone, together))
        assert (one - two).abs().max() < 2e-5, name


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# Bad input --------------------------------------------------------------------------------------


def fails(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--model", "no/such-model"], "no/such-model"),
        (["--dataset", "no_such_folder"], "no_such_folder"),
        (["--reward-split", "nothing"], "nothing"),
        (["--text-column", "words"], "no column 'words'; it has text"),
        (["--label-column", "stars", "--votes-column", "None"], "no column 'stars'"),
        (["--reward-model", "no_such_file.py:f"], "no_such_file.py"),
        (["--reward-model", "no/such-reward"], "no/such-reward"),
        (["--batch-size", "9"], "multiple of --num-minibatches"),
        (["--gradient-accumulation", "3"], "cannot be shared by 3"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["--prompt-words", "50"], "more than the 50 words of --prompt-words"),
        (["--reward-batch-size", "3"], "must be even"),
        (["--response-length", "1000"], "lower --response-length"),
        (["--text-column", "rating"], "rows that are no text"),
        (["--label-column", "text", "--votes-column", "None"], "rows that are no number"),
    ],
)
def test_bad_input(folders, capsys, flags, part):
    assert part in fails(capsys, *folders[1], *SMALL, *flags)


@pytest.mark.parametrize(
    ("body", "part"),
    [("[float('nan')] * len(texts)", "no finite number"), ("[1.0]", "shape (1,)"), ("1 / 0", "division by zero")],
)
def test_bad_reward_function(folders, capsys, tmp_path, body, part):
    (tmp_path / "mine.py").write_text(f"def score(texts):\n    return {body}\n")
    assert part in fails(capsys, *folders[1], *SMALL, "--reward-model", f"{tmp_path / 'mine.py'}:score")


def test_empty_prompts_are_refused(tmp_path, capsys):
    flags = make_folders(tmp_path, rows=[{"text": " good film", "head": "", "rating": 1.0}] * 4)
    assert "4 of 4 prompts are empty" in fails(capsys, *flags, *SMALL, "--prompt-column", "head")


def test_prompt_column_and_tokenizer_without_pad_token(tmp_path):
    rows = [
        {"text": " good film", "head": "it is", "rating": 1.0},
        {"text": " bad", "head": "very", "rating": -1.0},
    ] * 4
    flags = make_folders(tmp_path, rows=rows)
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "lm")
    assert AutoTokenizer.from_pretrained(tmp_path / "lm").pad_token_id is None
    folder = run(*flags, *SMALL, "--prompt-column", "head")
    assert json.loads((folder / "summary.json").read_text())["after"]["length"] > 0
