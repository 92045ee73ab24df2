"""Makes trl_ppo.npz: one full PPO update by TRL 1.12.0, the last release with a PPOTrainer.

    pip download --no-deps trl==1.12.0 && unzip trl-1.12.0-py3-none-any.whl -d trl112
    python tests/golden/make_trl_ppo.py trl112

A policy, a reference, a value model and a reward model, all tiny and random; eight left-padded prompts with
fixed responses; three epochs of two minibatches. No response holds the end-of-sequence or the pad token, for
TRL puts the score of an ended text on the pad after it, and rlhf_ppo.py on its last token. The value loss is not
clipped. Adam's epsilon is
1e-6: a key's bias has no gradient but rounding errors, which the usual 1e-8 would blow up.
"""

# ruff: noqa: E402 (the imports come after the path to TRL)
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import numpy as np
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

assert trl.__version__ == "1.12.0", trl.__version__
R, VOCAB, COUNT = 6, 24, 8
torch.manual_seed(0)
rng = np.random.default_rng(0)
size = dict(
    vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0
)
config = GPT2Config(**size)
policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
value, reward = (GPT2ForSequenceClassification(GPT2Config(**size, num_labels=1)) for _ in range(2))
with torch.no_grad():
    for model in (policy, reference, value, reward):
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="2"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1", padding_side="left")

settings = dict(
    learning_rate=5e-4, kl_coef=0.07, kl_estimator="k1", gamma=0.98, vf_coef=0.2, temperature=0.7, response_length=R
)
made: dict[str, np.ndarray] = {}


def snapshot(name: str) -> None:
    for key, p in policy.state_dict().items():
        made[f"policy_{name}/{key}"] = p.detach().numpy().copy()
    for key, p in value.transformer.state_dict().items():
        made[f"value_{name}/{key}"] = p.detach().numpy().copy()
    made[f"value_head_{name}"] = value.score.weight.detach().numpy().copy()


def fixed_responses(model, queries, batch_size, pad_token_id, generation_config):
    """Instead of sampling: fixed tokens, and the scores that sampling them would have returned."""
    responses = torch.from_numpy(rng.integers(2, VOCAB, size=(len(queries), R)))
    ids = torch.cat((queries, responses), 1)
    made["ids"], made["mask"] = ids.numpy().copy(), (ids != pad_token_id).long().numpy()
    with torch.no_grad():
        logits = ppo_trainer.forward(model, ids, pad_token_id).logits[:, -R - 1 : -1]
    return ids, logits / generation_config.temperature


def recorded_reward(model, *args):
    result = get_reward(model, *args)
    if model is reward:
        made["scores"] = result[1].numpy().copy()
    return result


orders, permutation, get_reward = [], np.random.permutation, ppo_trainer.get_reward
np.random.permutation = lambda count: orders.append(permutation(count)) or orders[-1]
ppo_trainer.batch_generation, ppo_trainer.get_reward = fixed_responses, recorded_reward

prompts = [[int(x) for x in rng.integers(2, VOCAB, size=n)] for n in (1, 2, 3, 4, 2, 5, 3, 4) * 2]
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", num_sample_generations=0, seed=1,
        per_device_train_batch_size=COUNT, gradient_accumulation_steps=1, num_mini_batches=2, num_ppo_epochs=3,
        total_episodes=COUNT, lam=0.9, cliprange=0.2, cliprange_value=1e9, optim="adamw_torch", adam_epsilon=1e-6,
        bf16=False, use_cpu=True, gradient_checkpointing=False, **settings,
    ),
    processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward, value_model=value,
    train_dataset=Dataset.from_dict({"input_ids": prompts}),
)  # fmt: skip
snapshot("before")
for key, p in reference.state_dict().items():
    made[f"reference/{key}"] = p.numpy().copy()
trainer.train()
snapshot("after")
made["permutations"] = np.concatenate([order[None] for order in orders])
made["kl"] = np.float32([row["objective/kl"] for row in trainer.state.log_history if "objective/kl" in row][0])
same = {name: value for name, value in settings.items() if name not in ("kl_estimator", "response_length")} | dict(
    max_completion_length=R, gae_lambda=0.9, num_minibatches=2, update_epochs=3, clip_coef=0.2, max_grad_norm=1e9,
    missing_eos_penalty=0.0, batch_size=COUNT,
)  # fmt: skip
made["setup"] = np.array(json.dumps({"config": size, "args": same}))
np.savez_compressed(Path(__file__).with_name("trl_ppo.npz"), **made)
print({key: x.shape for key, x in made.items() if "/" not in key})
