"""Times a PPO iteration of rlhf_ppo.py and of TRL 1.12.0, in turns, on the same models and sizes.

    python tests/golden/time_trl_ppo.py trl112 [hidden] [layers] [iterations]

Sampling, reward, reference, two epochs of two minibatches; 64 texts of 24 tokens after 4 of prompt; vocabulary
4,036; random GPT-2 models for policy and reward. TRL has a second network for the values; rlhf_ppo.py is timed
as it is by default (one network with two heads) and with --separate-value. See make_trl_ppo.py for the folder.
"""

# ruff: noqa: E402 (the imports come after the path to TRL)
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [sys.argv[1], str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
from accelerate import Accelerator
from conftest import load_script
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

torch.set_num_threads(1)
hidden, layers, iterations = (int(x) for x in (sys.argv[2:] + ["176", "4", "5"][len(sys.argv) - 2 :]))
rlhf = load_script("rlhf/rlhf_ppo.py")
VOCAB, BATCH, R = 4036, 64, 24
config = dict(vocab_size=VOCAB, n_positions=64, n_embd=hidden, n_layer=layers, n_head=4, bos_token_id=1, eos_token_id=1,
              pad_token_id=0)  # fmt: skip
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="", cleanup=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", padding_side="left")
rng = np.random.default_rng(0)
prompts = rng.integers(3, VOCAB, size=(BATCH * (iterations + 2), 4)).tolist()


def lm() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**config)).eval()


class Timer(PPOTrainer):
    def log(self, logs, *args, **kwargs):
        if "objective/kl" in logs:
            self.ends.append(time.perf_counter())


def time_trl() -> float:
    trainer = Timer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", num_sample_generations=0,
            per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=2, num_ppo_epochs=2,
            total_episodes=BATCH * (iterations + 1), response_length=R, temperature=1.0, learning_rate=1e-5,
            optim="adamw_torch", bf16=False, use_cpu=True, gradient_checkpointing=False, disable_tqdm=True,
        ),
        processing_class=tokenizer, model=lm(), ref_model=lm(),
        reward_model=GPT2ForSequenceClassification(GPT2Config(**config, num_labels=1)),
        value_model=GPT2ForSequenceClassification(GPT2Config(**config, num_labels=1)),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
    )  # fmt: skip
    trainer.ends = []
    trainer.train()
    return float(np.median(np.diff(trainer.ends)))


def time_ours(separate_value: bool) -> float:
    args = rlhf.Args(response_length=R, batch_size=BATCH, learning_rate=1e-5, separate_value=separate_value)
    accelerator, policy, reference = Accelerator(cpu=True), lm(), lm()
    agent = rlhf.ActorCritic(policy, separate_value)
    reward = rlhf.Reward("lm", policy, tokenizer, -1)
    optimizer, seconds = torch.optim.Adam(agent.parameters(), lr=1e-5), []
    for i in range(iterations + 1):
        start = time.perf_counter()
        chosen = prompts[i * BATCH : (i + 1) * BATCH]
        uniforms = rng.random((BATCH, R), np.float32)
        batch = rlhf.rollout(args, accelerator, tokenizer, agent, reference, reward, chosen, uniforms)
        rlhf.add_advantages(args, batch, 0.05)
        rlhf.ppo_update(args, accelerator, agent, optimizer, batch, rng)
        rlhf.summarize(batch)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


print(f"{sum(p.numel() for p in lm().parameters()) / 1e6:.1f}M parameters")
for turn in range(2):
    ours, theirs, separate = time_ours(False), time_trl(), time_ours(True)
    print(f"turn {turn}: rlhf_ppo.py {ours:.2f} s, TRL {theirs:.2f} s ({theirs / ours:.2f} times as long); "
          f"with --separate-value {separate:.2f} s ({theirs / separate:.2f})", flush=True)  # fmt: skip
