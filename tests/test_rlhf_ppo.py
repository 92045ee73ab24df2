"""Tests of rlhf/rlhf_ppo.py: formulas by definition, log-probabilities by generation, PPO by its exact optimum."""

import copy
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
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
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
    """A model folder and a dataset of preferences, as flags: people prefer what has "good" to what has "bad" in it."""
    tiny_lm(vocab=3 + len(words), **lm).save_pretrained(folder / "lm")
    tiny_tokenizer(words).save_pretrained(folder / "lm")
    if rows is None:
        rng, rows = np.random.default_rng(0), []
        for _ in range(120):
            others = rng.choice(["film", "book", "very", "is", "it"], (2, 3))
            good, bad = (
                " ".join(rng.permutation([word, *row])) for word, row in zip(("good", "bad"), others, strict=True)
            )
            rows.append({"prompt": str(rng.choice(["it is", "film"])), "chosen": f" {good}", "rejected": f" {bad}"})
    (folder / "data").mkdir()
    for n, split in enumerate(("train", "test")):
        lines = rows[n::2] if len(rows) >= 30 else rows
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "gold.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [text.split().count('good') - text.split().count('bad') for text in completions]\n"
    )
    names = {"model": "lm", "dataset": "data", "gold": "gold.py:score", "run-dir": "runs"}
    return [part for name, path in names.items() for part in (f"--{name}", str(folder / path))]


FLAGS = (
    "--total-episodes 16 --batch-size 8 --max-completion-length 5 --eval-episodes 8 --eval-every 1"
    " --sft-batch-size 12 --reward-epochs 10 --reward-batch-size 12 --reward-learning-rate 3e-3"
)
SMALL = FLAGS.split()


def run(*flags: object) -> Path:
    return rlhf.train(rlhf.parse_args([str(flag) for flag in flags]))


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
        batch = {"mask": response, "logprobs": logprobs, "values": values, "ref_logprobs": logprobs - 1,
                 "scores": torch.ones(3), "ended": torch.ones(3)}  # fmt: skip
        rlhf.add_advantages(rlhf.Args(), batch)
        loss = rlhf.ppo_loss(logprobs, logprobs.detach(), batch["advantages"], response, 0.2)[0]
        loss = rlhf.masked_sum(loss + (values - batch["returns"].detach()) ** 2, response)
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


def test_the_penalty_in_the_reward_has_the_exact_gradient_of_the_kl():
    logits, q = torch.tensor([0.5, -0.3, 0.1], requires_grad=True), torch.tensor([0.2, 0.3, 0.5])
    exact = torch.autograd.grad((torch.softmax(logits, 0) * (torch.log_softmax(logits, 0) - q.log())).sum(), logits)[0]
    logp = torch.log_softmax(logits, 0)
    reward = -(logp.detach() - q.log())
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
    loss, kl, clipped = (rlhf.masked_sum(x, mask) for x in rlhf.ppo_loss(new, old, advantages, mask, 0.2))
    assert loss.item() == pytest.approx(-(1.2 + 0.9 - 1.5))
    assert kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 0.9, 1.5)), rel=1e-5)
    assert clipped.item() == 2
    wild = torch.tensor([[1e4, -1e4, 0.0, math.inf]], requires_grad=True)
    loss = rlhf.masked_sum(rlhf.ppo_loss(wild, old, advantages, mask, 0.2)[0], mask)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, wild)[0]).all()


def test_bradley_terry_loss_by_hand():
    loss = rlhf.reward_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(3))], rel=1e-6)


def test_distinct_2_by_hand():
    assert rlhf.distinct_2(["a b a b", "a c"]) == pytest.approx(3 / 4)
    texts = ["a b"] * 128 + [f"{i} x" for i in range(128)]
    assert rlhf.distinct_2(texts) == pytest.approx((1 / 128 + 1) / 2)


def test_sft_learns_completions_with_their_end_and_no_prompt_or_padding():
    lm, texts = tiny_lm(), [([3, 4, 5, EOS], 2), ([6, 7, EOS], 1)]
    logprobs, mask = rlhf.completion_logprobs(lm, texts, PAD)
    expected = 0.0
    for ids, start in texts:
        logp = torch.log_softmax(lm(torch.tensor([ids])).logits[0], -1)
        expected += sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))
    assert rlhf.masked_sum(logprobs, mask).item() == pytest.approx(expected, rel=1e-5)
    assert mask.sum() == 4


# One iteration ----------------------------------------------------------------------------------


def one_batch(args: rlhf.Args, agent: torch.nn.Module, reference: torch.nn.Module) -> dict:
    rows = [{"prompt": "", "ids": [3 + i % 8, 4, *[5] * (i % 3)]} for i in range(8)]
    uniforms = np.random.default_rng(0).random((8, args.max_completion_length), np.float32)
    batch, texts = rlhf.rollout(args, tiny_tokenizer(), agent, reference, rows, uniforms)
    batch["scores"] = torch.tensor([float(len(text)) for text in texts])
    rlhf.add_advantages(args, batch)
    return batch


def test_first_ratio_is_one_and_first_kl_zero_and_the_reference_stays():
    args = rlhf.Args(max_completion_length=6, num_minibatches=1, update_epochs=1)
    lm, reference, accelerator = tiny_lm(vocab=11), tiny_lm(vocab=11), Accelerator(cpu=True)
    agent = rlhf.ActorCritic(lm)
    batch = one_batch(args, agent, reference)
    assert (batch["kl"] == 0).all()
    assert (batch["values"] == 0).all()
    before = [p.clone() for p in reference.parameters()]
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    first = rlhf.update(args, accelerator, agent, optimizer, batch, np.random.default_rng(0))
    assert abs(first["losses/approx_kl"]) < 1e-10 and first["losses/clipfrac"] == 0
    second = rlhf.update(args, accelerator, agent, optimizer, batch, np.random.default_rng(0))
    assert second["losses/approx_kl"] > 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(parts):
    weights = []
    for accumulation in (1, parts):
        args = rlhf.Args(max_completion_length=6, num_minibatches=1, gradient_accumulation=accumulation)
        agent = rlhf.ActorCritic(tiny_lm(vocab=11))
        batch = one_batch(args, agent, tiny_lm(vocab=11, seed=1))
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)
        rlhf.update(args, Accelerator(cpu=True), agent, optimizer, batch, np.random.default_rng(0))
        weights.append(torch.cat([p.detach().flatten() for p in agent.parameters()]))
    assert batch["mask"].sum(1).unique().numel() > 1, "equally long texts would hide a mean of means"
    start = torch.cat([p.detach().flatten() for p in rlhf.ActorCritic(tiny_lm(vocab=11)).parameters()])
    assert (weights[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)


def test_missing_end_costs_its_penalty_and_kl_its_price():
    args = rlhf.Args(missing_eos_penalty=3.0, kl_coef=0.5)
    batch = {"mask": torch.tensor([[1, 1], [1, 1], [1, 0]]), "scores": torch.tensor([5.0, 5.0, 5.0]),
             "ended": torch.tensor([1.0, 0.0, 1.0]), "values": torch.zeros(3, 2), "logprobs": torch.zeros(3, 2),
             "ref_logprobs": torch.tensor([[0.0, 0.0], [0.0, 0.0], [-2.0, -9.0]])}  # fmt: skip
    rlhf.add_advantages(args, batch)
    assert batch["rewards"].tolist() == [[0, 5], [0, 2], [4, 0]]


def test_heads_start_as_the_papers_say(tmp_path):
    agent = rlhf.ActorCritic(tiny_lm())
    assert (agent.value_head.weight == 0).all() and (agent.value_head.bias == 0).all()
    tiny_lm(width=512).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    _, net = rlhf.new_reward_model(rlhf.Args(), str(tmp_path), torch.device("cpu"))
    assert net.score.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert net.score.bias is None


@pytest.mark.parametrize("same", [False, True])
def test_reward_is_read_at_the_end_token_also_where_it_is_the_pad_token(same):
    tokenizer = tiny_tokenizer(pad=not same)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_config(
        GPT2Config(**tiny_lm(vocab=11).config.to_dict() | {"num_labels": 1})
    ).eval()
    reward = rlhf.RewardModel(net, tokenizer)
    scores = reward(["good", "very bad"], [" film", " book is it"])
    for text, score in zip(["good film", "very bad book is it"], scores, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"] + [EOS]])
        hidden = net.base_model(input_ids=ids).last_hidden_state[0, -1]
        assert score == pytest.approx(net.score(hidden)[0].item(), abs=1e-6)


# One update against TRL -------------------------------------------------------------------------


class TwoNetworks(rlhf.ActorCritic):
    """TRL's value function has a network of its own."""

    def __init__(self, policy: torch.nn.Module):
        super().__init__(policy)
        self.critic = copy.deepcopy(policy.base_model)

    def forward(self, ids, mask, count, temperature):
        logprobs, _ = rlhf.token_logprobs(self.policy, ids, mask, count, temperature)
        hidden = self.critic(input_ids=ids, attention_mask=mask, position_ids=rlhf.positions(mask)).last_hidden_state
        return logprobs, self.value_head(hidden[:, -count - 1 : -1]).squeeze(-1)


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
    agent = TwoNetworks(policy)
    agent.critic.load_state_dict(weights("value_before/"))
    agent.value_head.weight.data = torch.from_numpy(golden["value_head_before"])
    agent.value_head.bias.requires_grad_(False)  # TRL's has none

    args = rlhf.Args(**setup["args"])
    ids, seen = torch.from_numpy(golden["ids"]), torch.from_numpy(golden["mask"])
    width = args.max_completion_length
    with torch.no_grad():
        logprobs, values = agent(ids, seen, width, args.temperature)
        ref_logprobs, _ = rlhf.token_logprobs(reference, ids, seen, width, args.temperature)
    batch = {"ids": ids, "seen": seen, "mask": seen[:, -width:], "logprobs": logprobs, "values": values}
    batch |= {"ref_logprobs": ref_logprobs, "scores": torch.from_numpy(golden["scores"]), "ended": torch.ones(len(ids))}
    rlhf.add_advantages(args, batch)
    np.testing.assert_allclose(batch["kl"].sum(1).mean(), golden["kl"], atol=1e-5)

    class Shuffles:  # TRL's own
        orders = iter(golden["permutations"])

        def permutation(self, count: int) -> np.ndarray:
            return next(self.orders)

    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, eps=1e-6)
    rlhf.update(args, Accelerator(cpu=True), agent, optimizer, batch, Shuffles())
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
        "def score(prompts, completions, **columns):\n"
        "    return [t.split().count('a') - 0.7 * t.split().count('c') for t in completions]\n"
    )
    flags = make_folders(tmp_path, words, rows=[{"prompt": "a", "chosen": " b", "rejected": " c"}] * 4, scale=3.0)
    settings = f"""--reward-model {tmp_path / "score.py"}:score --gold None --sft-model {tmp_path / "lm"}
        --eval-every 1000 --no-normalize-reward --missing-eos-penalty 0 --kl-coef {beta} --max-completion-length 3
        --batch-size 128 --total-episodes 12800 --learning-rate 3e-3 --update-epochs 3 --eval-episodes 2"""
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
    log_ref, log_pi = exact(tmp_path / "lm"), exact(folder / "policy")
    assert log_ref.exp().sum().item() == pytest.approx(1, abs=1e-5)
    best = beta * torch.logsumexp(log_ref + rewards / beta, 0)  # J(pi*) = beta log Z
    reached = (log_pi.exp() * (rewards - beta * (log_pi - log_ref))).sum()
    start = (log_ref.exp() * rewards).sum()
    assert best > start + 0.5
    assert reached / best >= 0.95 and (reached - start) / (best - start) >= 0.95, (start, reached, best)


# Data ---------------------------------------------------------------------------------------


def usable_rows(folder: Path, rows: list[dict], tokenizer: object = None, needed: tuple = (), **changes) -> list[dict]:
    """What load_rows makes of these rows in a file."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = rlhf.Args(dataset=str(file), **changes)
    return rlhf.load_rows(args, tokenizer or tiny_tokenizer(), "train", needed)


def test_what_cannot_be_learnt_from_is_counted(tmp_path, capsys):
    rows = [
        {"prompt": "it is", "chosen": " good film", "rejected": " bad"},
        {"prompt": "it is", "chosen": " good", "rejected": " good"},
        {"prompt": "it is", "chosen": " ", "rejected": " bad"},
        {"prompt": "it is", "chosen": " good", "rejected": None},
        {"prompt": "it is", "chosen": " very very very very good", "rejected": " bad"},
        {"prompt": "it is it is", "chosen": " good", "rejected": " bad"},
        {"prompt": "it is", "chosen": " marvellous", "rejected": " bad"},
        {"prompt": "", "chosen": "good", "rejected": "bad"},
    ]
    [row] = usable_rows(tmp_path, rows, max_completion_length=4, max_prompt_length=3)
    assert row["chosen_ids"] == (tiny_tokenizer()("it is good film")["input_ids"] + [EOS], 2)
    shown = capsys.readouterr().out.splitlines()
    reasons = ("the same", "empty completion", "cannot be read", "--max-completion-length", "--max-prompt-length",
               "does not know", "empty prompt")  # fmt: skip
    assert len(shown) == len(reasons) and all(
        line.startswith("1 of 8 rows of 'train' are left out: ") for line in shown
    )
    assert all(any(reason in line for line in shown) for reason in reasons)
    with pytest.raises(SystemExit) as stop:
        usable_rows(tmp_path, rows[1:3])
    assert stop.value.code == 2 and "no row of the split 'train'" in capsys.readouterr().err


def test_texts_end_exactly_once():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("good film")["input_ids"]
    assert rlhf.encode(tokenizer, "good", " film") == ([*ids, EOS], 1)
    assert rlhf.encode(tokenizer, "good", " film <eos> <eos>") == ([*ids, EOS], 1)
    assert rlhf.encode(tokenizer, "", "good film") == (
        [EOS, *ids, EOS],
        1,
    )  # something must come before the first token


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, of which a and b become one token."""
    vocab = {token: n for n, token in enumerate(["<pad>", "<eos>", "a", "b", "c", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def test_a_completion_starts_where_the_tokens_part():
    """The prompt's last letter merges with the completion's first: that token is learnt, for it is not the prompt's."""
    assert rlhf.encode(merging_tokenizer(), "ca", "bc") == ([4, 5, 4, EOS], 1)  # c|ab|c
    assert rlhf.encode(merging_tokenizer(), "ca", "cc") == ([4, 2, 4, 4, EOS], 2)  # c|a|c|c


def test_unknown_token_that_is_the_end_token_loses_no_text(tmp_path):
    """As in GPT-2."""
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    assert len(usable_rows(tmp_path, [{"prompt": "it is", "chosen": " good", "rejected": " bad"}], tokenizer)) == 1


def test_first_token_that_the_tokenizer_writes_itself_is_not_doubled():
    tokenizer = tiny_tokenizer(["good", "bad"])
    bos = tokenizer.eos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, EOS)])
    assert rlhf.encode(tokenizer, "", "good") == ([EOS, 3, EOS], 1)  # <s> good </s>


CHAT = """{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor -%}
{% if add_generation_prompt %}assistant{% endif %}"""


def test_conversations_of_every_form(tmp_path, capsys):
    tokenizer = tiny_tokenizer(["user", "assistant", "good", "bad", "film"])
    tokenizer.chat_template = CHAT
    user, good, bad = ({"role": r, "content": c} for r, c in
                       (("user", "film"), ("assistant", "good"), ("assistant", "bad")))  # fmt: skip
    for row in (
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "film", "chosen": [user, good], "rejected": [user, bad]},
    ):
        [found] = usable_rows(tmp_path, [row], tokenizer)
        assert tokenizer.decode(found["ids"]) == "user film <eos> assistant"
        assert tokenizer.decode(found["chosen_ids"][0]) == "user film <eos> assistant good <eos>"
        assert tokenizer.decode(found["rejected_ids"][0]) == "user film <eos> assistant bad <eos>"
        assert found["chosen_ids"][1] == found["rejected_ids"][1] == 4
    wrong = {"prompt": [user], "chosen": [good], "rejected": [user]}
    with pytest.raises(SystemExit):
        usable_rows(tmp_path, [wrong], tokenizer)
    assert "the last message is by 'user', not by the assistant" in capsys.readouterr().err


def test_a_text_that_repeats_its_prompt_has_it_once(tmp_path):
    rows = [{"prompt": "it is", "chosen": "it is good", "rejected": "it is bad"}]
    [row] = usable_rows(tmp_path, rows)
    assert tiny_tokenizer().decode(row["chosen_ids"][0]) == "it is good <eos>" and row["chosen"] == " good"


def test_texts_without_prompts_are_split_and_cut_and_every_kind_of_file_is_read(tmp_path, capsys):
    (tmp_path / "texts.csv").write_text("text,stars\nit is good film,5\nbad book,1\n", encoding="utf-8")
    args = rlhf.Args(dataset=str(tmp_path / "texts.csv"), prompt_words=1, max_completion_length=2)
    rows = rlhf.load_rows(args, tiny_tokenizer(), "train")
    assert [(row["prompt"], row["completion"], row["stars"]) for row in rows] == [("it", " is good film", 5),
                                                                                   ("bad", " book", 1)]  # fmt: skip
    assert [len(row["completion_ids"][0]) for row in rows] == [3, 3]  # one is cut, the other ends
    assert rows[0]["completion_ids"][0][-1] != EOS == rows[1]["completion_ids"][0][-1]
    assert "1 of 2 texts of 'train' are cut to --max-completion-length" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["rlhf_ppo", "dpo", "grpo", "pretrain"])
def test_two_folders_of_one_name_are_not_confused(tmp_path, script):
    """The datasets library caches a folder under its last name; a changed file is read again too."""
    for n, word in enumerate(("one", "two", "three")):
        folder = tmp_path / str(min(n, 1)) / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text(json.dumps({"text": word}) + "\n")
        os.utime(folder / "train.jsonl", (n, n))
        head = "---\nconfigs:\n  - config_name: default\n    data_files:\n"
        (folder / "README.md").write_text(head + "      - split: train\n        path: train.jsonl\n---\n")
        assert load_script(f"rlhf/{script}.py").load_split(str(folder), "train")["text"] == [word]


# Whole runs -------------------------------------------------------------------------------------


def test_run_leaves_models_that_transformers_loads(small_run):
    tokenizer = AutoTokenizer.from_pretrained(small_run / "policy")
    for name in ("sft", "policy"):
        lm = AutoModelForCausalLM.from_pretrained(small_run / name)
        assert lm(**tokenizer("good film", return_tensors="pt")).logits.shape == (1, 2, 11)
    sft, policy = (AutoModelForCausalLM.from_pretrained(small_run / name).lm_head.weight for name in ("sft", "policy"))
    assert not torch.equal(sft, policy)
    saved = torch.load(small_run / "model.pt", weights_only=True)["parts"]["agent"]
    assert torch.equal(policy, saved["policy.transformer.wte.weight"])
    reward = rlhf.load_reward(str(small_run / "reward_model"), -1, torch.device("cpu"))
    good, bad = reward(["it is", "it is"], [" good film is", " bad film is"])
    assert good > bad


def test_summary_samples_and_columns(small_run):
    summary = json.loads((small_run / "summary.json").read_text())
    assert summary["reward_accuracy"] > 0.9 and summary["reward_accuracy_gold"] > 0.9
    before, after = summary["before"], summary["after"]
    assert before["kl"] == pytest.approx(0, abs=1e-5) and after["kl"] != 0
    wanted = {"reward", "gold", "gold_std", "kl", "kl_interval", "length", "distinct_2", "ended"}
    assert set(before) == set(after) >= wanted
    assert summary["gold_gain"] == pytest.approx((after["gold"] - before["gold"]) / before["gold_std"])
    samples = (small_run / "samples.md").read_text()
    assert samples.count("- before: ") == samples.count("- after: ") == 8
    rows = (small_run / "metrics.csv").read_text().splitlines()
    assert len({row.count(",") for row in rows}) == 1
    assert rows[-1].split(",")[0] == "16"


@pytest.mark.parametrize("count", [1, 2])
def test_interrupted_run_resumes_where_it_was(folders, small_run, count, monkeypatch):
    interrupt_at_report(rlhf, monkeypatch, count, lambda: run(*folders[1], *SMALL))
    newest = max(Path(folders[0] / "runs").iterdir(), key=lambda p: p.stat().st_mtime)
    assert rows_of(run("--resume", newest)) == rows_of(small_run)


@pytest.mark.parametrize("stage", ["sft", "train_reward_model"])
def test_a_run_interrupted_in_an_early_stage_goes_on_from_its_folder(folders, small_run, stage, monkeypatch):
    original = getattr(rlhf, stage)

    def stop(*args):
        if stage == "train_reward_model":
            original(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rlhf, stage, stop)
        with pytest.raises(SystemExit):
            run(*folders[1], *SMALL)
    newest = max(Path(folders[0] / "runs").iterdir(), key=lambda p: p.stat().st_mtime)
    assert (newest / "sft").exists() == (newest / "reward_model").exists() == (stage == "train_reward_model")
    assert rows_of(run("--resume", newest)) == rows_of(small_run)
    summary, whole = (json.loads((folder / "summary.json").read_text()) for folder in (newest, small_run))
    assert summary["reward_accuracy"] == whole["reward_accuracy"] and summary["after"] == whole["after"]


def test_saved_run_is_evaluated(small_run, capsys):
    after = json.loads((small_run / "summary.json").read_text())["after"]
    run("--eval", small_run)
    assert f"gold {after['gold']:.4g}" in capsys.readouterr().out


def test_lora_trains_adapters_and_leaves_whole_models(folders, tmp_path):
    folder = run(*folders[1], *SMALL, "--lora-rank", "2", "--run-dir", tmp_path, "--learning-rate", "1e-2")
    saved = torch.load(folder / "model.pt", weights_only=True)["parts"]["agent"]
    assert saved and all("lora_" in name or "value_head" in name for name in saved)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-5) and abs(summary["after"]["kl"]) > 1e-4
    sft, policy = (AutoModelForCausalLM.from_pretrained(folder / name).transformer.h[0].attn.c_attn.weight
                   for name in ("sft", "policy"))  # fmt: skip
    assert not torch.equal(sft, policy)
    start = AutoModelForCausalLM.from_pretrained(folders[0] / "lm").transformer.wte.weight
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "sft").transformer.wte.weight, start)


def test_two_processes_equal_one(tmp_path, folders):
    """Two CPU processes share each batch; one process has it whole. The weights must be the same."""
    flags = [*folders[1], *SMALL, "--max-grad-norm", "0.5"]
    alone = run(*flags, "--run-dir", tmp_path / "one")
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


def fails(capsys, *flags: object) -> str:
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
        (["--train-split", "nothing"], "nothing"),
        (["--reward-split", "nothing"], "nothing"),
        (["--reward-model", "no_such_file.py:f"], "no_such_file.py"),
        (["--reward-model", "no/such-reward"], "no/such-reward"),
        (["--gold", "no_such_file.py:f"], "no_such_file.py"),
        (["--batch-size", "9"], "multiple of --num-minibatches"),
        (["--gradient-accumulation", "5"], "cannot be shared by 5"),
        (["--temperature", "0"], "--temperature must be > 0"),
        (["--max-completion-length", "1000"], "lower --max-completion-length"),
    ],
)
def test_bad_input(folders, capsys, flags, part):
    runs = set((folders[0] / "runs").glob("*"))
    assert part in fails(capsys, *folders[1], *SMALL, *flags)
    assert set((folders[0] / "runs").glob("*")) == runs  # nothing half-trained


@pytest.mark.parametrize(
    ("body", "part"),
    [("[float('nan')] * len(prompts)", "finite number"), ("[1.0]", "for each of 2"), ("1 / 0", "division by zero")],
)
def test_bad_reward_function(folders, capsys, tmp_path, body, part):
    (tmp_path / "mine.py").write_text(f"def score(prompts, completions, **columns):\n    return {body}\n")
    message = fails(capsys, *folders[1], *SMALL, "--reward-model", f"{tmp_path / 'mine.py'}:score")
    assert part in message and not (tmp_path / "runs").exists()


def test_a_reward_function_sees_the_columns_of_the_dataset(folders, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, chosen, rejected, **columns):\n"
        "    assert len(prompts) == len(completions) == len(chosen)\n"
        "    return [float(c.split()[-1:] == w.split()[-1:]) for c, w in zip(completions, chosen)]\n"
    )
    flags = [*folders[1], *SMALL, "--reward-model", f"{tmp_path / 'mine.py'}:score", "--run-dir", tmp_path]
    assert "reward_accuracy" not in json.loads((run(*flags) / "summary.json").read_text())


def test_a_language_model_is_no_reward_model(folders, capsys):
    message = fails(capsys, *folders[1], *SMALL, "--reward-model", str(folders[0] / "lm"))
    assert "is no reward model" in message and "score.weight" in message


def test_tokens_beyond_the_embedding_are_named(folders, capsys, tmp_path):
    tiny_lm(vocab=11).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(tmp_path)
    message = fails(capsys, *folders[1], *SMALL, "--model", tmp_path)
    assert "has a token 11 and the model only 11" in message


def test_a_value_head_fits_hidden_states_of_another_width(tmp_path):
    """OPT-350m's layout: hidden states are projected before the output layer."""
    config = OPTConfig(vocab_size=11, hidden_size=16, word_embed_proj_dim=8, num_hidden_layers=1, ffn_dim=16,
                       num_attention_heads=2, max_position_embeddings=64, do_layer_norm_before=False,
                       pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS)  # fmt: skip
    folders = make_folders(tmp_path)
    OPTForCausalLM(config).save_pretrained(tmp_path / "lm")
    folder = run(*folders, *SMALL)
    saved = torch.load(folder / "model.pt", weights_only=True)["parts"]["agent"]
    hidden = AutoModelForCausalLM.from_pretrained(folder / "policy").base_model(torch.ones(1, 2, dtype=torch.long))[0]
    assert saved["value_head.weight"].shape == (1, hidden.shape[-1]) == (1, 8)
    assert json.loads((folder / "summary.json").read_text())["reward_accuracy"] > 0.8


def test_a_model_without_a_cache_is_refused_before_anything_is_trained(tmp_path, capsys):
    folders = make_folders(tmp_path)
    MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, pad_token_id=PAD, bos_token_id=EOS,
                                 eos_token_id=EOS)).save_pretrained(tmp_path / "lm")  # fmt: skip
    assert "cannot be used here" in fails(capsys, *folders, *SMALL)
    assert not (tmp_path / "runs").exists()


def test_a_classifier_with_few_positions_cuts_what_is_longer(folders, tmp_path):
    """It reads 8 positions; prompts and completions may have 12 tokens."""
    config = BertConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        max_position_embeddings=8, pad_token_id=PAD)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tiny_tokenizer().save_pretrained(tmp_path / "judge")
    reward = rlhf.load_reward(str(tmp_path / "judge"), -1, torch.device("cpu"))
    words = "good film is very bad it not book"  # 8 tokens
    long, other, within = reward([words, words, words[:-4]], [" good good", " bad", "it bad"])
    assert long == pytest.approx(other, abs=1e-6) and abs(long - within) > 1e-6
    flags = [*folders[1], *SMALL, "--reward-model", tmp_path / "judge", "--max-completion-length", "10"]
    summary = json.loads((run(*flags, "--run-dir", tmp_path) / "summary.json").read_text())
    assert summary["reward_scale"][1] > 0 and summary["after"]["kl"] != 0


def test_tokenizer_without_pad_token(tmp_path):
    flags = make_folders(tmp_path)
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "lm")
    assert AutoTokenizer.from_pretrained(tmp_path / "lm").pad_token_id is None
    summary = json.loads((run(*flags, *SMALL) / "summary.json").read_text())
    assert summary["after"]["length"] > 0 and summary["reward_accuracy"] > 0.8


def test_minibatches_hold_every_text_once_an_epoch_and_texts_of_like_length():
    lengths = np.random.default_rng(0).integers(5, 40, 640).tolist()
    batches = rlhf.batches_by_length(lengths, 64, 2, seed=1)
    assert len(batches) == 20 and all(len(rows) == 64 for rows in batches)
    for epoch in (batches[:10], batches[10:]):
        assert sorted(np.concatenate(epoch)) == list(range(640))
        longest = [max(lengths[n] for n in rows) for rows in epoch]
        assert np.mean(longest) < 26  # 39 at random, where nearly every minibatch has one of the longest
        assert longest != sorted(longest)  # nor do they come from short to long
    assert not np.array_equal(batches[0], batches[10])
    again = rlhf.batches_by_length(lengths, 64, 2, seed=1)
    assert all(np.array_equal(rows, others) for rows, others in zip(batches, again, strict=True))
    few = rlhf.batches_by_length([7] * 100, 64, 1, seed=1)
    assert [len(rows) for rows in few] == [64, 64] and set(np.concatenate(few)) == set(range(100))
