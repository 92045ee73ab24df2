"""The studies: what is run, on which seeds, and what is drawn. run.py runs and draws them.

A study is a question, answered by groups of variants. A variant is one command line of one script,
run once per seed. A group becomes one row of the figure, or one panel of it if it has one. The same
variant may stand in several groups; it is run once. Seeds start at 301: 1 to 10 were tuned on, 101 to
210 served the first version of the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEED = 301


@dataclass(frozen=True)
class Variant:
    label: str
    """its name in the table and the figure"""
    script: str
    """path of the script, seen from the repository"""
    env: str | None = None
    """value of --env; None for a script that has no such flag"""
    flags: str = ""
    """further flags, as typed"""
    x: float | tuple[float, float] | None = None
    """its place on the axis of a scaling panel, or in a heat map (row, column)"""
    published: str = ""
    """what others report, with the protocol"""
    home: str = ""
    """the study that keeps its results, if that is another one with the same command"""

    @property
    def name(self) -> str:
        """Stem of its result files."""
        text = f"{self.label} {self.env or ''}".lower()
        for sign, word in {"α": "alpha", "γ": "gamma", "ε": "epsilon", "λ": "lambda", "+": "plus"}.items():
            text = text.replace(sign, word)
        return re.sub(r"[^a-z0-9.]+", "-", text).strip("-")


@dataclass(frozen=True)
class Panel:
    key: str
    """a column of metrics.csv (curves); a key of summary.json, or of the record, with dots inside (heat, scaling)"""
    title: str
    kind: str = "curves"
    """curves, heat or scaling (log-log, with the slope)"""
    x: str = "step"
    """curves: the column on the horizontal axis; otherwise the axis's label ("row, column" for a heat map)"""
    linear_to: float | None = None
    """curves: the vertical axis is logarithmic beyond this value, on both sides of zero; None is linear everywhere"""
    bottom: float | None = None
    """curves: the vertical axis begins here; None shows everything"""


@dataclass(frozen=True)
class Group:
    title: str
    variants: Sequence[Variant]
    panels: Sequence[Panel] | None = None
    """None takes the study's"""
    ordered: bool = False
    """the variants are values of one number: coloured from dark to light"""
    in_table: bool = True


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    question: str
    groups: Sequence[Group]
    panels: Sequence[Panel] = (Panel("charts/episodic_return", "mean return of the last 100 training episodes"),)
    columns: Sequence[tuple[str, str]] = ()
    """more columns of the table: header and key, as in Panel; a metric's is its mean over the last tenth of the run,
    with " max" behind the key its greatest value, with " step" the median difference of two neighbouring rows"""
    ratios: Sequence[tuple[Variant, Variant]] = ()
    """pairs whose speeds are compared seed by seed"""
    random: Mapping[str, float] = field(default_factory=dict)
    """mean return of random actions in the tasks over which a script's scores are aggregated"""
    pictures: Sequence[tuple[Variant, str]] = ()
    """pictures that a run leaves in its folder, kept from the variant's first seed as figures/<study>_<picture>"""
    columns_only: bool = False
    """leave out the columns of episodic scripts"""
    limit: float = 1800
    """seconds after which a run counts as failed"""
    variants: list[Variant] = field(init=False)

    def __post_init__(self) -> None:
        variants = list(dict.fromkeys(variant for group in self.groups for variant in group.variants))
        assert len({v.name for v in variants}) == len(variants), f"two variants of {self.name} share a name"
        object.__setattr__(self, "variants", variants)


RETURN = Panel("charts/episodic_return", "mean return of the last 100 training episodes")
PPO, DQN, A2C, REINFORCE, Q, SAC, TD3 = (
    f"algos/{name}.py" for name in ("ppo", "dqn", "a2c_gae", "reinforce", "q_learning", "sac", "td3")
)


def sweep(script: str, env: str, flag: str, values: Sequence[object], name: str) -> list[Variant]:
    """One variant per value of a flag."""
    return [Variant(f"{name} {value}", script, env, f"--{flag} {value}") for value in values]


# Scores ----------------------------------------------------------------------------------------
# Every script in algos/ on its default environment and on every environment it has a preset for.
# Seconds a run, with start-up and evaluation, on one core: CartPole about 8, LunarLander 40 to 120,
# tabular 3 to 25, the rest 20 to 40; ten seeds of everything: about two hours of one core.

LABELS = {"ppo": "PPO", "dqn": "DQN", "a2c_gae": "A2C + GAE", "reinforce": "REINFORCE", "q_learning": "Q-learning",
          "dynamic_programming": "Dynamic programming", "dqn_atari": "DQN from pixels", "sac": "SAC",
          "td3": "TD3"}  # fmt: skip
NOT_IN_SCORES = ("dqn_atari", "ppo_lstm", "ppo_masks")  # a GPU and hours; tasks of their own: memory_and_masks.py

PUBLISHED = {
    ("ppo", "CartPole-v1"): "CleanRL 490 ± 6 (500k, 3 seeds, training); SLM-Lab 499 (200k, 4)",
    ("ppo", "LunarLander-v3"): "RL Zoo, v2, 242 ± 32 (1M, 1 run); SLM-Lab 183 (300k, 4); gymnasium 130 (500k, 10)",
    ("ppo", "LunarLanderContinuous-v3"): "RL Zoo, v2, 271 ± 32 (1 run)",
    ("ppo", "Acrobot-v1"): "CleanRL −86.4 ± 1.3 (500k, 3, training); SLM-Lab −81 (4)",
    ("dqn", "CartPole-v1"): "CleanRL 489 ± 16 (500k, 3, training); RL Zoo 500 (50k, 1 run); SLM-Lab 240 (200k, 4)",
    ("dqn", "LunarLander-v3"): "RL Zoo, v2, 154 ± 79 (100k, 1 run); SLM-Lab 195, with PER 266 (300k, 4)",
    ("dqn", "Acrobot-v1"): "CleanRL −91.5 ± 7.2 (500k, 3, training); SLM-Lab −94 (4)",
    ("a2c_gae", "CartPole-v1"): "RL Zoo 500 (500k, 1 run); SLM-Lab 497 (200k, 4)",
    ("a2c_gae", "LunarLander-v3"): "RL Zoo, v2, 156 ± 80 (200k, 1 run); SLM-Lab 27 (300k, 4)",
    ("a2c_gae", "Acrobot-v1"): "SLM-Lab −84 (4)",
    ("sac", "Pendulum-v1"): "RL Zoo −157 (20k, 1 run)",
    ("sac", "LunarLanderContinuous-v3"): "RL Zoo, v2, 260 (500k, 1 run)",
    ("sac", "BipedalWalker-v3"): "RL Zoo 298 (500k, 1 run)",
    ("td3", "Pendulum-v1"): "RL Zoo −152 (20k, 1 run)",
    ("reinforce", "CartPole-v1"): "SLM-Lab 483 (200k, 4)",
    ("q_learning", "FrozenLake-v1"): "best possible policy .744 (exact)",
    ("q_learning", "FrozenLake8x8-v1"): "best possible policy .913 (exact)",
}


def preset_envs(script: Path) -> list[str]:
    """The default environment of a script and those of its PRESETS, read without importing it."""
    text = script.read_text(encoding="utf-8")
    default = re.findall(r'^    env: .*?= "([^"]+)"', text, re.M)
    presets = re.search(r"^PRESETS.*?^}", text, re.M | re.S)
    return list(dict.fromkeys(default + re.findall(r'^    "([^"]+)": dict\(', presets[0] if presets else "", re.M)))


def score_groups() -> list[Group]:
    by_env: dict[str, list[Variant]] = {}
    for script in sorted((ROOT / "algos").glob("*.py")):
        name = script.stem
        for env in preset_envs(script) if name not in NOT_IN_SCORES else ():
            variant = Variant(LABELS.get(name, name), f"algos/{script.name}", env,
                              published=PUBLISHED.get((name, env), ""))  # fmt: skip
            by_env.setdefault(env, []).append(variant)
    known = ["CartPole-v1", "LunarLander-v3", "LunarLanderContinuous-v3", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1"]
    order = sorted(by_env, key=lambda env: known.index(env) if env in known else len(known))
    return [Group(env, by_env[env]) for env in order]


SCORES = Study(
    "scores", "Scores",
    "What does every script reach on every environment it has settings for, and how long does that take?",
    score_groups(), (RETURN,),
    random={"CartPole-v1": 21.8, "LunarLander-v3": -185.4, "Acrobot-v1": -498.4},  # 300 episodes; tested
)  # fmt: skip

# Q-learning ------------------------------------------------------------------------------------
# 25 cells of 400k steps at about 5 s, 7 further variants: about 35 minutes of one core at ten seeds
# (the heat map alone with --only heat and three seeds: 7 minutes).

ALPHAS, GAMMAS = (0.01, 0.03, 0.1, 0.3, 1.0), (0.8, 0.9, 0.95, 0.99, 0.999)
LAKE = "FrozenLake-v1"
EXACT = Panel("charts/exact_return", "exact success probability of the greedy policy")
Q_DEFAULT = Variant("α = n^-0.6, ε 1 → 0.01", Q, LAKE)
CLIFF = "CliffWalking-v1"
Q_LEARNING = Study(
    "q_learning", "Tabular Q-learning",
    "Which learning rates, discount factors and exploration schedules solve FrozenLake, and how does SARSA differ?",
    [
        Group("FrozenLake, constant learning rate",
              [Variant(f"heat α {a:g} γ {g:g}", Q, LAKE, f"--learning-rate {a} --lr-power 0 --gamma {g}", x=(a, g))
               for a in ALPHAS for g in GAMMAS],
              [Panel("exact_return", "exact success probability (best possible: .744)", "heat",
                     "learning rate α, discount γ")], in_table=False),
        Group("FrozenLake, step size",
              [Q_DEFAULT, Variant("α = 0.1", Q, LAKE, "--learning-rate 0.1 --lr-power 0"),
               Variant("α = 1/n", Q, LAKE, "--lr-power 1")], [EXACT]),
        Group("FrozenLake, exploration",
              [Q_DEFAULT, Variant("ε always 0.1", Q, LAKE, "--start-e 0.1 --end-e 0.1"),
               Variant("ε → 0.01 exponentially", Q, LAKE, "--epsilon-decay exponential"),
               Variant("optimistic, ε always 0.01", Q, LAKE, "--start-e 0.01 --end-e 0.01 --initial-value 1")],
              [EXACT]),
        Group("CliffWalking, ε = 0.1",
              [Variant(name, Q, CLIFF, f"--algorithm {name.lower().replace(' ', '-')}")
               for name in ("Q-learning", "SARSA", "Expected SARSA", "Double Q-learning")],
              [replace(RETURN, bottom=-200)]),
    ],
    columns=[("exact value of the greedy policy", "exact_return")], pictures=[(Q_DEFAULT, "q_table.png")],
)  # fmt: skip

# DQN -------------------------------------------------------------------------------------------
# About 13 s a run, 10 variants: 22 minutes of one core at ten seeds.

CART = "CartPole-v1"
PLAIN = "--no-double --n-step 1 --tau 0.1"
NO_TARGET, NO_REPLAY = "--tau 1 --target-network-frequency 1", "--buffer-size 256"
Q_VALUES = Panel("losses/q_values", "mean predicted value", linear_to=100)
DQN_PLAIN = Variant("plain DQN (1-step)", DQN, CART, PLAIN)
DQN_STUDY = Study(
    "dqn", "DQN: ablations and extensions",
    "What do replay and the target network do, and what does each extension add, alone and together?",
    [
        Group("Without its two ideas", [
            DQN_PLAIN,
            Variant("no target network", DQN, CART, f"{PLAIN} {NO_TARGET}"),
            Variant("no replay", DQN, CART, f"{PLAIN} {NO_REPLAY}"),
            Variant("neither", DQN, CART, f"{PLAIN} {NO_REPLAY} {NO_TARGET}"),
        ], [RETURN, Q_VALUES]),
        Group("One extension at a time", [
            DQN_PLAIN,
            Variant("+ double", DQN, CART, "--n-step 1 --tau 0.1"),
            Variant("+ dueling", DQN, CART, f"{PLAIN} --dueling"),
            Variant("+ prioritised", DQN, CART, f"{PLAIN} --prioritized-replay-alpha 0.6"),
            Variant("+ 15-step", DQN, CART, "--no-double --tau 0.1"),
            Variant("all four", DQN, CART, "--tau 0.1 --dueling --prioritized-replay-alpha 0.6"),
            Variant("preset (double, 15-step, τ 0.02)", DQN, CART),
        ], [RETURN, Q_VALUES]),
    ],
    columns=[("Q at first states, predicted", "predicted_return"), ("obtained", "obtained_return")],
)  # fmt: skip

# Policy gradient -------------------------------------------------------------------------------
# About 7 s a run, 10 variants: 12 minutes of one core at ten seeds. LunarLander's runs are those of scores.
# The noise of the gradient at one and the same policy is measured by gradient_variance.py.

CURVE_PANELS = [RETURN, Panel("losses/entropy", "entropy of the policy, nats")]
POLICY_GRADIENT = Study(
    "policy_gradient", "REINFORCE and actor-critic: learning",
    "What do a baseline, a critic and its λ do to learning, and to the policy's entropy?",
    [
        Group("REINFORCE, CartPole", [
            Variant("whole return, no baseline", REINFORCE, CART, "--baseline none --no-reward-to-go"),
            Variant("no baseline", REINFORCE, CART, "--baseline none"),
            Variant("mean return", REINFORCE, CART, "--baseline mean"),
            Variant("mean at the same time", REINFORCE, CART, "--baseline time"),
            Variant("V(s), 10 critic epochs", REINFORCE, CART, "--baseline value --critic-epochs 10"),
        ]),
        Group("A2C, CartPole", sweep(A2C, CART, "gae-lambda", (0, 0.5, 0.9, 0.95, 1), "λ ="), ordered=True),
        Group("Presets, LunarLander", [Variant(LABELS[Path(script).stem], script, "LunarLander-v3", home="scores",
                                               published=PUBLISHED.get((Path(script).stem, "LunarLander-v3"), ""))
                                       for script in (REINFORCE, A2C)], in_table=False),
    ],
    CURVE_PANELS, columns=[("entropy at the end", "losses/entropy")],
)  # fmt: skip

# PPO -------------------------------------------------------------------------------------------
# 4 epochs over each rollout, so that the constraint has something to do (the preset makes one).
# About 9 s a run, 20 variants: 30 minutes of one core at ten seeds.

BASE = "--update-epochs 4 --learning-rate 5e-3"
KL = Panel("losses/approx_kl", "nats moved per update")
PPO_BASE = Variant("base: clip 0.2, 4 epochs", PPO, CART, f"{BASE} --clip-coef 0.2")


def ppo(label: str, flags: str, base: str = BASE, env: str = CART) -> Variant:
    return Variant(label, PPO, env, f"{base} {flags}".strip())


PPO_STUDY = Study(
    "ppo", "PPO: what each part does",
    "How much does each part of PPO matter where data are used four times over?",
    [
        Group("The constraint", [
            ppo("clip 0.05", "--clip-coef 0.05"), ppo("clip 0.1", "--clip-coef 0.1"), PPO_BASE,
            ppo("clip 0.3", "--clip-coef 0.3"), ppo("clip 0.4", "--clip-coef 0.4"),
            ppo("no constraint", "--clip-coef inf"),
        ], [RETURN, KL]),
        Group("Epochs, clipped and not", [
            ppo("1 epoch", "--update-epochs 1"), PPO_BASE, ppo("16 epochs", "--update-epochs 16"),
            ppo("no constraint", "--clip-coef inf"),
            ppo("no constraint, 16 epochs", "--clip-coef inf --update-epochs 16"),
            ppo("policy gradient: one step a rollout",
                "--update-epochs 1 --num-minibatches 1 --learning-rate 1.5e-2", base=""),
        ], [RETURN, KL]),
        Group("Entropy bonus", [
            PPO_BASE, ppo("entropy 0.001", "--ent-coef 0.001"), ppo("entropy 0.01", "--ent-coef 0.01"),
            ppo("entropy 0.1", "--ent-coef 0.1"),
        ], [RETURN, Panel("losses/entropy", "entropy")]),
        Group("Details", [
            PPO_BASE, ppo("advantages not normalised", "--no-norm-adv"),
            ppo("time limit treated as death", "--no-bootstrap-truncated"),
            ppo("learning rate not annealed", "--no-anneal-lr"), ppo("preset (1 epoch)", "", base=""),
        ], [RETURN, Panel("losses/explained_variance", "explained variance of the critic")]),
    ],
)  # fmt: skip

# The same on LunarLander: about 45 s a run, 5 variants; three seeds: 12 minutes of one core.

LANDER = "LunarLander-v3"
PPO_LANDER = Study(
    "ppo_lunarlander", "PPO's parts on LunarLander",
    "Does what holds on CartPole hold on a harder task?",
    [Group(LANDER, [
        ppo("preset", "", "", LANDER), ppo("no constraint", "--clip-coef inf", "", LANDER),
        ppo("advantages not normalised", "--no-norm-adv", "", LANDER),
        ppo("time limit treated as death", "--no-bootstrap-truncated", "", LANDER),
    ])],
    [RETURN, KL],
)  # fmt: skip

# SAC -------------------------------------------------------------------------------------------
# About 10 s a run (one gradient step per step: 50), 14 variants: 40 minutes of one core at ten seeds.

PENDULUM, LANDER_CONTINUOUS = "Pendulum-v1", "LunarLanderContinuous-v3"
SAC_PRESET = Variant("preset", SAC, PENDULUM)
SAC_STUDY = Study(
    "sac", "SAC and TD3: what each part does",
    "What do the second critic, the target critics and the learnt temperature do, how much do more updates help, and "
    "what are TD3's three remedies worth?",
    [
        Group("Without its parts", [
            SAC_PRESET,
            Variant("single critic", SAC, PENDULUM, "--num-critics 1"),
            Variant("no target critics", SAC, PENDULUM, "--tau 1"),
            Variant("fixed temperature 0.1", SAC, PENDULUM, "--no-autotune"),
            Variant("time limit treated as death", SAC, PENDULUM, "--no-bootstrap-truncated"),
            Variant("layer norm in the critics", SAC, PENDULUM, "--layer-norm"),
        ], [RETURN, Panel("losses/q_values", "mean predicted value", bottom=-300)]),
        Group("Steps per gradient step",
              [Variant(f"{steps} steps", SAC, PENDULUM, f"--train-frequency {steps}") for steps in (1, 4)]
              + [SAC_PRESET, Variant("16 steps", SAC, PENDULUM, "--train-frequency 16")],
              [RETURN, Panel("charts/episodic_return", "the same against seconds", x="seconds")], ordered=True),
        Group("TD3 without its remedies", [
            Variant("TD3", TD3, PENDULUM, home="scores"),
            Variant("TD3, single critic", TD3, PENDULUM, "--num-critics 1"),
            Variant("TD3, no delay", TD3, PENDULUM, "--policy-frequency 1"),
            Variant("TD3, no smoothing", TD3, PENDULUM, "--policy-noise 0"),
            Variant("DDPG: none of the three", TD3, PENDULUM, "--num-critics 1 --policy-frequency 1 --policy-noise 0"),
        ], [RETURN, Panel("losses/q_values", "mean predicted value")]),
    ],
    columns=[("Q at first states, predicted", "predicted_return"), ("obtained", "obtained_return")],
)  # fmt: skip

# DQN from pixels -------------------------------------------------------------------------------
# Pong: one run of 26 minutes. The small games of tests/catch_env.py, 2 minutes a run, need
#   PYTHONPATH=tests python benchmarks/run.py catch --seeds 3

ATARI = "algos/dqn_atari.py"
PONG = Study(
    "pong", "Pong from pixels",
    "What does one run of the preset reach that a single CPU core has time for?",
    [Group("Pong", [Variant("DQN from pixels", ATARI, "ALE/Pong-v5", "--bf16 --eval-episodes 10",
                            published="CleanRL 20.3 (10M steps, 3 seeds, training)")])],
    [Panel("charts/episodic_return", "mean return of the last games, 100 at most"),
     Panel("losses/q_values", "mean predicted value")],
    limit=3000,
)  # fmt: skip

CATCH = Study(
    "catch", "Catch from pixels",
    "Is a small game learnt from pixels, and a movement only where several frames are seen?",
    [Group("Catch", [Variant("Catch", ATARI, "catch_env:Catch-v0", "--bf16 --eval-episodes 200"),
                     Variant("drifting ball", ATARI, "catch_env:CatchDrift-v0", "--bf16 --eval-episodes 200"),
                     Variant("drifting ball, one frame", ATARI, "catch_env:CatchDrift-v0",
                             "--bf16 --eval-episodes 200 --frame-stack 1")])],
    [RETURN, Panel("charts/episodic_return", "the same against seconds", x="seconds")],
)  # fmt: skip

# Against others --------------------------------------------------------------------------------
# Run with --workers 1, so that nothing else runs beside a measured run, for example:
#   python benchmarks/run.py against_others --only cartpole --workers 1 --peers-python sb3/bin/python
# Stable-Baselines3 needs, a run: CartPole PPO 30 s, A2C 60 s, DQN 70 s; LunarLander PPO 620 s, A2C 150 s, DQN 370 s.
# The cap of 900 s of training is for slower machines; the table says where it fell. CartPole at three seeds: 9
# minutes; LunarLander at three: 66 minutes.

PEERS = "benchmarks/peers.py"


def peer(algo: str, env: str, flags: str = "") -> Variant:
    return Variant(f"Stable-Baselines3 {algo.upper()}", PEERS, env, f"--algo {algo} {flags}".strip())


PAIRS = [(Variant(f"plainrl {algo.upper()}", script, env), peer(algo, env, flags))
         for env, flags in ((CART, ""), (LANDER, "--max-seconds 900"))
         for algo, script in (("a2c", A2C), ("dqn", DQN), ("ppo", PPO))]  # fmt: skip
SAC_ON = {env: Variant("plainrl SAC", SAC, env) for env in (PENDULUM, LANDER_CONTINUOUS)}
# On Pendulum half as long again as the Zoo: within its 20,000 steps the mean of 100 episodes holds the first of all.
LIMITS = {PENDULUM: "--total-timesteps 30000", LANDER_CONTINUOUS: "--max-seconds 900"}
PAIRS += [(SAC_ON[env], peer("sac", env, flags)) for env, flags in LIMITS.items()]
UNPAIRED = [peer("td3", env, flags) for env, flags in LIMITS.items()]  # a pair shares its colour
AGAINST_OTHERS = Study(
    "against_others", "Against Stable-Baselines3",
    "Each with its own best-known settings (the RL Zoo's for Stable-Baselines3), on one core, in one session: "
    "who is how fast?",
    [Group(env, [variant for variants in (*PAIRS, UNPAIRED) for variant in variants if variant.env == env],
           [RETURN, Panel("charts/episodic_return", "the same against seconds", x="seconds")])
     for env in (CART, LANDER, *SAC_ON)],
    ratios=PAIRS, columns=[("stopped by the cap", "capped")],
)  # fmt: skip

# MuJoCo ----------------------------------------------------------------------------------------
# Needs pip install "gymnasium[mujoco]". A run: SAC 8 to 17 minutes, PPO 4 to 8, Stable-Baselines3 43 to 85.

ROBOTS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")
PUBLISHED_ROBOTS = {
    (PPO, "HalfCheetah-v5"): "CleanRL, v4, 1,443 ± 46 (1M, 3 seeds, training)",
    (PPO, "Hopper-v5"): "CleanRL, v4, 2,383 ± 272 (1M, 3, training)",
    (PPO, "Walker2d-v5"): "CleanRL, v4, 2,288 ± 572 (1M, 3, training)",
    (SAC, "HalfCheetah-v5"): "CleanRL, v4, 9,635 ± 1,423 (1M, 3, training)",
    (SAC, "Hopper-v5"): "CleanRL, v4, 2,310 ± 343 (1M, 3, training)",
    (SAC, "Walker2d-v5"): "CleanRL, v4, 3,591 ± 912 (1M, 3, training)",
    (SAC, "Ant-v5"): "RL Zoo, v3, 4,616 (1M, 1 run)",
}
MUJOCO = Study(
    "mujoco", "MuJoCo: SAC and PPO",
    "What do SAC and PPO reach on four robots, at equal steps and in equal seconds?",
    [Group(robot, [
        Variant("SAC", SAC, robot, "--total-timesteps 200000", published=PUBLISHED_ROBOTS.get((SAC, robot), "")),
        Variant("PPO", PPO, robot, published=PUBLISHED_ROBOTS.get((PPO, robot), "")),
        peer("sac", robot, "--total-timesteps 200000"),
    ]) for robot in ROBOTS],
    [RETURN, Panel("charts/episodic_return", "the same against seconds", x="seconds")], limit=7200,
)  # fmt: skip

# Scaling ---------------------------------------------------------------------------------------
# Always 200k steps; about 6 s a run (1 environment: 30), 16 variants; three seeds are enough: 6 minutes.

STEPS = "--total-timesteps 200000 --eval-episodes 1"


def scaling(title: str, script: str, flag: str, values: Sequence[int], common: str = "") -> Group:
    variants = [Variant(f"{flag} {value}", script, CART, f"{STEPS} {common} --{flag} {value}", x=value)
                for value in values]  # fmt: skip
    panels = [Panel("train_seconds", "seconds of training", "scaling", title),
              Panel("peak_memory_mb", "peak memory, MB", "scaling", title)]  # fmt: skip
    return Group(f"{title} ({Path(script).stem})", variants, panels)


SCALING = Study(
    "scaling", "How time and memory grow",
    "How do 200,000 steps' seconds and the peak memory grow with the size of things?",
    [scaling("environments in parallel", PPO, "num-envs", (1, 4, 16, 64, 256), "--num-steps 64 --num-minibatches 1"),
     scaling("hidden width", PPO, "hidden", (16, 64, 256, 1024)),
     scaling("replay size", DQN, "buffer-size", (1_000, 10_000, 100_000, 1_000_000)),
     scaling("batch size", DQN, "batch-size", (32, 128, 512, 2048))],
    columns=[("training, s", "train_seconds"), ("steps per second", "sps"), ("peak memory, MB", "peak_memory_mb")],
    columns_only=True,
)  # fmt: skip

STUDIES = {study.name: study for study in (SCORES, Q_LEARNING, DQN_STUDY, POLICY_GRADIENT, PPO_STUDY, PPO_LANDER,
                                           SAC_STUDY, MUJOCO, PONG, CATCH, AGAINST_OTHERS, SCALING)}  # fmt: skip
