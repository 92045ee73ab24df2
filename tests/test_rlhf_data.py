"""The data of the RLHF scripts: ratings, corpus, tiny language model, and pretrain.py, which made the last."""

import gzip
import hashlib
import importlib.util
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = ROOT / "rlhf" / "data"
pretrain = load_script("rlhf/pretrain.py")


def load_maker(name: str):
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_ratings, make_corpus = load_maker("make_ratings"), load_maker("make_corpus")
gold = load_maker("gold/gold")


@pytest.fixture(scope="module")
def splits():
    return {name: make_corpus.read_jsonl(DATA / "human_ratings" / f"{name}.jsonl.gz")
            for name in ("reward", "judge", "heldout")}  # fmt: skip


@pytest.fixture(scope="module")
def corpus():
    return gzip.decompress((DATA / "corpus" / "reviews.txt.gz").read_bytes()).decode().splitlines()


@pytest.fixture(scope="module")
def lm():
    return (AutoTokenizer.from_pretrained(DATA / "tiny_lm"), AutoModelForCausalLM.from_pretrained(DATA / "tiny_lm"))


# Human ratings ---------------------------------------------------------------------------------------


def test_ratings_have_the_published_counts(splits):
    assert {name: len(rows) for name, rows in splits.items()} == {"reward": 6_645, "judge": 6_644, "heldout": 1_000}
    assert Counter(row["source"] for rows in splits.values() for row in rows) == {"movie": 10_603, "product": 3_686}


def test_a_rating_is_the_mean_of_what_people_said(splits):
    for rows in splits.values():
        for row in rows:
            assert set(row) == {"text", "source", "rating", "ratings"}
            assert len(row["ratings"]) >= 15 and set(row["ratings"]) <= set(range(-4, 5))
            assert row["rating"] == pytest.approx(np.mean(row["ratings"]), abs=1e-4)
            assert row["text"] == " ".join(row["text"].split()) != ""
    means = np.array([row["rating"] for rows in splits.values() for row in rows])
    assert abs(means.mean()) < 0.2 and 1.4 < means.std() < 1.9


def test_ratings_are_decoded_as_utf8(splits):
    letters = Counter(letter for rows in splits.values() for row in rows for letter in row["text"])
    assert letters["é"] > 50 and letters["�"] == letters["Ã"] == letters["\x92"] == 0


def test_no_sentence_is_in_two_splits(splits):
    keys = [make_ratings.sentence_key(row["text"]) for rows in splits.values() for row in rows]
    assert len(set(keys)) == len(keys) == 14_289


def test_the_split_is_decided_by_the_sentence_alone(splits):
    def rank(row):
        return hashlib.sha256(make_ratings.sentence_key(row["text"]).encode()).hexdigest()

    order = sorted((row for rows in splits.values() for row in rows), key=rank)
    assert order[:1_000] == splits["heldout"]
    assert order[1_000::2] == splits["reward"] and order[1_001::2] == splits["judge"]


def test_datasets_reads_the_folder_like_a_hub_name(splits, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(DATA / "human_ratings"), cache_dir=str(tmp_path))
    assert set(loaded) == set(splits)
    assert loaded["judge"][7] == splits["judge"][7]


# The corpus ------------------------------------------------------------------------------------------


def test_corpus_is_large_and_small_enough(corpus):
    assert len(corpus) >= 30_000
    assert (DATA / "corpus" / "reviews.txt.gz").stat().st_size <= 3_000_000
    assert len({text.lower() for text in corpus}) == len(corpus)


def test_corpus_keeps_its_own_rules(corpus, splits):
    words = set(make_corpus.common_words(make_corpus.movie_sentences()))
    assert len(words) == 4_000
    human = {" ".join(word.lower() for word in make_corpus.WORD.findall(row["text"]))
             for rows in splits.values() for row in rows}  # fmt: skip
    assert [text for text in corpus if not make_corpus.keep(text, words, human)] == []


@pytest.mark.parametrize(
    "text",
    [
        "the film is good.",  # no capital
        "The film is good",  # no end
        "Too short.",
        "The film is good. I like it.",  # two sentences
        "The film is is good.",
        "The film is good and the film is bad.",  # the film is ... the film is
        "The film is supercalifragilistic.",
        "The film is a piece of shit.",
    ],
)
def test_filter_drops(text):
    words = {"the", "film", "is", "good", "and", "bad", "too", "short", "i", "like", "it", "a", "piece", "of", "shit"}
    assert not make_corpus.keep(text, words, set())


def test_filter_keeps_a_clean_new_sentence_only():
    words = {"the", "film", "is", "good"}
    assert make_corpus.keep("The film is good.", words, set())
    assert not make_corpus.keep("The film is good.", words, {"the film is good"})


def test_fine_tuning_sees_neither_judge_nor_heldout_nor_blocked_words(splits):
    seen = {row["text"] for row in make_corpus.movie_sentences()}
    assert seen <= {row["text"] for row in splits["reward"]} and len(seen) > 4_000
    assert not any(make_corpus.BLOCKED.search(text) for text in seen)


@pytest.mark.parametrize("word", ["shit", "Bullshit", "fucking", "damned", "ass", "slut", "nigger", "faggot", "rape"])
def test_block_list_knows(word):
    assert make_corpus.BLOCKED.search(f"this {word} film")


@pytest.mark.parametrize("word", ["class", "passes", "grape", "therapist", "hello", "title", "assume", "cockpit"])
def test_block_list_spares(word):
    assert not make_corpus.BLOCKED.search(f"this {word} film")


# The raters and the comparisons ----------------------------------------------------------------------


def pairs_right(scores, ratings, apart):
    """The share of pairs of texts, rated at least apart from each other, that the scores order as the ratings do."""
    i, j = np.triu_indices(len(scores), 1)
    far = abs(ratings[i] - ratings[j]) >= apart
    return ((scores[i] > scores[j]) == (ratings[i] > ratings[j]))[far].mean()


def test_raters_know_people_as_well_as_the_readme_says(splits, monkeypatch):
    texts, ratings = zip(*((row["text"], row["rating"]) for row in splits["heldout"]), strict=True)
    found = []
    for repetition in (gold.REPETITION, 0):
        monkeypatch.setattr(gold, "REPETITION", repetition)
        scores, people = np.array(gold.score([""] * len(texts), texts)), np.array(ratings)
        right = pairs_right(scores, people, 1e-9), pairs_right(scores, people, 1)
        found.append([round(float(x), 2) for x in (np.corrcoef(scores, people)[0, 1], *right)])
    assert found == [[0.68, 0.75, 0.83], [0.70, 0.76, 0.83]]


def test_raters_read_prompt_and_completion_as_one_text_and_mind_repetition():
    assert gold.score(["It is a"], [" wonderful film."]) == gold.score([""], ["It is a wonderful film."])
    good, again = gold.score(["", ""], ["A funny film.", "A funny, funny, funny film."])
    assert gold.repetition("A funny, funny, funny film.") == 1 / 2 and again < good - 2
    assert gold.repetition("This is an odd, odd, odd film.") == 0  # words of three letters may come again


def test_preferences_are_the_raters_with_noise():
    import datasets

    loaded = datasets.load_dataset(str(DATA / "preferences"))
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 20_000, "test": 2_000}
    for rows in loaded.values():
        assert rows.column_names == ["prompt", "chosen", "rejected"]
        assert all(len(row["prompt"].split()) == 2 and row["chosen"] != row["rejected"] for row in rows)
        columns = {name: rows[name] for name in rows.column_names}
        chosen, rejected = (np.array(gold.score(columns["prompt"], columns[name])) for name in ("chosen", "rejected"))
        assert abs((chosen > rejected).mean() - 0.806) < 0.02  # the rest are the mistakes that raters make
        temperature = 0.5 * np.concatenate((chosen, rejected)).std()
        stated = 1 / (1 + np.exp(-abs(chosen - rejected) / temperature))
        assert abs((chosen > rejected).mean() - stated.mean()) < 0.02  # as often as Bradley-Terry says


# The tiny model --------------------------------------------------------------------------------------


def test_tiny_lm_is_small_and_apart_in_its_special_tokens(lm):
    tokenizer, model = lm
    assert sum(path.stat().st_size for path in (DATA / "tiny_lm").iterdir()) <= 10_000_000
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    assert len(set(special)) == 4 and None not in special
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)
    assert model.dtype == torch.float32 and not model.training


def test_tokenizer_gives_back_every_text_it_knows(lm, corpus):
    tokenizer, _ = lm
    known = [text for text in corpus[:2000] if tokenizer.unk_token_id not in tokenizer(text)["input_ids"]]
    assert len(known) > 1_900
    assert tokenizer.batch_decode(tokenizer(known)["input_ids"]) == known
    assert tokenizer("")["input_ids"] == []  # nothing is added
    head, tail = "The film isn't", " good, but I like it."
    assert tokenizer(head)["input_ids"] + tokenizer(tail)["input_ids"] == tokenizer(head + tail)["input_ids"]


def test_vocabulary_has_no_foul_word(lm):
    assert [word for word in lm[0].get_vocab() if make_corpus.BLOCKED.search(word)] == []


def test_tiny_lm_predicts_texts_left_out(lm):
    tokenizer, model = lm
    _, valid = pretrain.load_texts(pretrain.Args())
    rows = pretrain.encode(tokenizer, valid, 32)
    with_bos = pretrain.valid_loss(pretrain.Args(), model, tokenizer, rows)
    counts = Counter(token for row in rows for token in row)
    entropy = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
    assert with_bos < 3.6 < entropy - 1  # far better than knowing how frequent each word is
    total = number = 0
    with torch.no_grad():
        for row in rows[:300]:  # the first word given, as in the RLHF scripts: no worse than a little
            loss = model(torch.tensor([row]), labels=torch.tensor([row])).loss
            total, number = total + loss.item() * (len(row) - 1), number + len(row) - 1
    assert total / number < 3.6 + 0.1


def test_tiny_lm_writes_clean_sentences_that_end(lm):
    tokenizer, model = lm
    torch.manual_seed(0)
    prompts = tokenizer(["The film", "I", "An uneven", "This movie is"] * 64, padding=True, return_tensors="pt")
    prompts.pop("token_type_ids", None)
    ids = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=30, temperature=1.0)
    assert (ids == tokenizer.unk_token_id).sum() - (prompts["input_ids"] == tokenizer.unk_token_id).sum() == 0
    ended = (ids == tokenizer.eos_token_id).any(1).float().mean()
    assert ended > 0.95
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert not any(make_corpus.BLOCKED.search(text) for text in texts)
    assert np.mean([re.fullmatch(r"[A-Z][a-zA-Z',;: ]+[.!?]", text) is not None for text in texts]) > 0.95
    assert pretrain.distinct_2([text.split() for text in texts]) > 0.5


def test_readme_tells_the_truth(corpus, lm):
    text = (DATA / "README.md").read_text()
    for file in [*(DATA / "human_ratings").glob("*.gz"), DATA / "corpus" / "reviews.txt.gz",
                 DATA / "gold" / "weights.npy", *(DATA / "preferences").glob("*.gz"),
                 DATA / "tiny_lm" / "model.safetensors", DATA / "tiny_lm" / "tokenizer.json"]:  # fmt: skip
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text, file.name
        assert f"{file.stat().st_size:,}" in text, file.name
    assert f"{len(corpus):,} reviews" in text
    assert f"{sum(len(review.split()) for review in corpus):,} words" in text
    assert f"{sum(p.numel() for p in lm[1].parameters()):,} parameters" in text


# pretrain.py -----------------------------------------------------------------------------------------

TEXTS = ["The film is good.", "The film isn't good, but I like it.", "It is bad!", "A zebra is good."]


@pytest.fixture
def tokenizer():
    return pretrain.build_tokenizer(TEXTS[:3], max_vocab=100)


def test_tokens_are_words_with_their_space(tokenizer):
    ids = tokenizer(TEXTS[1])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "The", " film", " isn't", " good", ",", " but", " I", " like", " it", ".",
    ]  # fmt: skip
    assert tokenizer.unk_token_id in tokenizer(TEXTS[3])["input_ids"]


def test_vocabulary_holds_the_commonest_words():
    small = pretrain.build_tokenizer(["a b b c c c"], max_vocab=6)
    assert set(small.get_vocab()) == {*pretrain.SPECIAL, " c", " b"}


def test_targets_are_the_next_tokens_and_nothing_else(tokenizer):
    rows = pretrain.encode(tokenizer, [TEXTS[0], TEXTS[3]], max_length=32)
    inputs, targets = pretrain.pad_batch(rows, tokenizer, True, torch.device("cpu"))
    assert inputs[0].tolist() == [tokenizer.bos_token_id, *rows[0][:-1]]
    assert targets[0].tolist() == rows[0] and rows[0][-1] == tokenizer.eos_token_id
    unknown = [-100 if token == tokenizer.unk_token_id else token for token in rows[1]]
    assert targets[1].tolist() == unknown and -100 in unknown
    inputs, targets = pretrain.pad_batch([rows[0], rows[0][:3]], tokenizer, False, torch.device("cpu"))
    assert inputs.shape == (2, len(rows[0]) - 1)
    assert inputs[0, 0] == rows[0][0]
    assert targets[1].tolist() == rows[0][1:3] + [-100] * (len(rows[0]) - 3)


def test_a_cut_text_has_no_end(tokenizer):
    [row] = pretrain.encode(tokenizer, [TEXTS[1]], max_length=4)
    assert len(row) == 4 and tokenizer.eos_token_id not in row


def test_loss_is_that_of_each_text_alone(tokenizer):
    torch.manual_seed(0)
    args = pretrain.Args(hidden=16, layers=2, heads=2)
    model = pretrain.make_lm(args, TEXTS[:3])[1]
    rows = pretrain.encode(tokenizer, TEXTS[:3], 32)
    loss = pretrain.lm_loss(model, *pretrain.pad_batch(rows, tokenizer, False, torch.device("cpu")))
    total = number = 0
    for row in rows:  # by definition, one place after the other
        logps = torch.log_softmax(model(torch.tensor([row])).logits[0], -1)
        total -= sum(logps[t, row[t + 1]] for t in range(len(row) - 1))
        number += len(row) - 1
    assert loss.item() == pytest.approx((total / number).item(), abs=1e-5)


def test_loss_is_the_models_own_where_it_scales_its_logits():
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=12)
    model = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.05, pad_token_id=0, bos_token_id=1, eos_token_id=1))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 1]])
    own = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(pretrain.lm_loss(model, ids[:, :-1], ids[:, 1:]), own)


def test_every_text_is_read_once_an_epoch():
    rows = [[0] * (1 + n % 7) for n in range(1_000)]
    first, again, second = (pretrain.batches_of(rows, 8, seed=1, epoch=e) for e in (0, 0, 1))
    assert sorted(index for batch in first for index in batch) == list(range(1_000))
    assert first == again != second
    spread = np.mean([np.ptp([len(rows[n]) for n in batch]) for batch in first])
    assert spread < 1.5  # batches hold texts of similar length


def test_distinct_2_by_hand():
    assert pretrain.distinct_2([["a", "b", "a", "b"]]) == 2 / 3
    assert pretrain.distinct_2([["a", "b"], ["a", "b"]]) == 1 / 2
    assert pretrain.distinct_2([["a"]]) == 0


def test_learning_rate_rises_and_falls():
    args = pretrain.Args(total_episodes=1_000, warmup=100, batch_size=10, learning_rate=1.0)
    rates = [pretrain.learning_rate_at(step, args) for step in range(0, 1_000, 10)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.01


@pytest.fixture(scope="module")
def grammar(tmp_path_factory):
    """Texts of a language in which three letters and a verdict are left to chance: the best loss is known."""
    folder = tmp_path_factory.mktemp("grammar")
    rng = np.random.default_rng(0)
    letters, verdicts = rng.choice(list("abcdefgh"), (2_000, 3)), rng.choice(["good", "bad"], 2_000)
    lines = (f"The {a} {b} {c} is {verdict}." for (a, b, c), verdict in zip(letters, verdicts, strict=True))
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_learns_a_language_to_its_entropy(grammar, tmp_path):
    flags = ["--dataset", str(grammar), "--total-episodes", "6000", "--hidden", "32", "--layers", "1", "--heads", "2",
             "--batch-size", "32", "--warmup", "320", "--learning-rate", "0.01", "--report-every", "1600",
             "--eval-episodes", "64", "--valid-percent", "10", "--run-dir", str(tmp_path)]  # fmt: skip
    folder = pretrain.train(pretrain.parse_args(flags))
    summary = json.loads((folder / "summary.json").read_text())
    best = (3 * math.log(8) + math.log(2)) / 8  # The, three letters, is, good, ".", <eos>
    assert best - 0.05 < summary["valid_loss"] < best + 0.06
    samples = (folder / "samples.txt").read_text().splitlines()
    assert np.mean([re.fullmatch(r"The [a-h] [a-h] [a-h] is (good|bad)\.", text) is not None for text in samples]) > 0.9

    model = AutoModelForCausalLM.from_pretrained(folder / "lm")  # what was saved is what was measured
    loaded = AutoTokenizer.from_pretrained(folder / "lm")
    args = pretrain.Args(dataset=str(grammar), valid_percent=10)
    rows = pretrain.encode(loaded, pretrain.load_texts(args)[1], args.max_length)
    assert pretrain.valid_loss(args, model, loaded, rows) == pytest.approx(summary["valid_loss"], abs=1e-5)


def test_resuming_inside_an_epoch_changes_nothing(grammar, tmp_path, monkeypatch):
    flags = ["--dataset", str(grammar), "--hidden", "16", "--layers", "1", "--heads", "2", "--batch-size", "32",
             "--report-every", "320", "--eval-episodes", "4", "--warmup", "0", "--run-dir", str(tmp_path)]  # fmt: skip

    def run(*more):
        return pretrain.train(pretrain.parse_args([*flags, *more]))

    def weights(folder):
        return torch.load(folder / "model.pt", weights_only=True)["parts"]["lm"]

    monkeypatch.setattr(pretrain, "learning_rate_at", lambda step, args: 1e-3)  # the schedule knows the total
    whole, part = run("--total-episodes", "3200"), run("--total-episodes", "960")
    assert not torch.equal(weights(whole)["lm_head.weight"], weights(part)["lm_head.weight"])
    assert run("--resume", str(part), "--total-episodes", "3200") == part
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(part).values(), strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden", "10", "--heads", "4"], "--hidden 10 must be a multiple of --heads 4"),
        (["--valid-percent", "0"], "--valid-percent must be in (0, 50]"),
        (["--dataset", "no/such/folder"], "cannot load the split 'train' of the dataset no/such/folder"),
        (["--text-column", "review"], "the dataset has no column 'review'; it has text"),
        (["--model", "no/such/model"], "cannot load the language model 'no/such/model'"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        pretrain.train(pretrain.parse_args([*flags, "--run-dir", str(tmp_path)]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: " + message) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
