"""Needles and loss by length: cases are what they say, chance is chance, and a model that knows scores as one."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from infra.errors import ConfigError
from model.config import ModelConfig
from model.transformer import Transformer
from stages.evaluation.context import ContextJob, compare, gather, headline, measure_context
from stages.evaluation.intervals import bootstrap_mean, bootstrap_ratio, wilson
from stages.evaluation.lengths import length_table, spread, window_losses
from stages.evaluation.needle import CHANCE, Haystacks, NeedleGrid, find_needles, needle_table
from stages.problems.lookup import plant
from stages.problems.problem import split_of
from stages.tokens.bpe import train
from stages.tokens.loader import PackedLoader
from stages.tokens.packing import LongDocuments
from stages.tokens.shards import ShardWriter, TokenShards, write_index
from stages.training.checkpoint import save_model
from stages.training.distributed import Ranks

CPU = Ranks(0, 1, torch.device("cpu"))
GRID = NeedleGrid(lengths=(96, 160), depths=3, cases=2)


def ignore(done: int, total: int, unit: str, **metrics: float) -> None:
    """A report that nobody reads."""


@pytest.fixture(scope="module")
def tokenizer():
    return train(
        ["What does box 0417 hold? Box 0417 holds 号箱里是什么 the quick brown fox，狐狸跳过了懒狗。"] * 3, 420
    )


@pytest.fixture(scope="module")
def tokens_dir(tmp_path_factory, tokenizer):
    """Validation text of both languages, documents of 8 to 120 words, and worked problems that are no haystack."""
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer.save(folder)
    writer = ShardWriter(folder, 0, tokenizer.vocab_size)
    for n in range(40):
        language, text = ("en", "the fox ") if n % 2 else ("zh", "狐狸跳过")
        text = text * (4 + 7 * n % 60) + str(n)
        names = {"id": str(n), "language": language, "domain": "math" if n % 5 == 0 else "prose", "source": "s"}
        ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        writer.add(ids, "validation", bytes=len(text.encode()), **names)
    write_index(folder, [writer.close()], tokenizer.vocab_size)
    return folder


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(
            **{"family": "llama", "vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 2, "n_heads": 2},
            **{"d_ff": 64, "max_position": 160, "init_std": 0.1},
        )
    )


def haystacks(tokens_dir, tokenizer, grid=GRID):
    return Haystacks(str(tokens_dir), grid, grid.lengths, tokenizer, seed=0)


def test_a_case_is_text_with_a_held_out_fact_at_its_depth_and_the_question_behind(tokens_dir, tokenizer):
    made = haystacks(tokens_dir, tokenizer)
    assert len(made.cells) == 2 * 3 * 2 * 2
    texts = {}
    for number in range(len(made.cells)):
        case = made.case(number)
        assert len(case.prompt) + len(case.answer) == case.length
        words, value = tokenizer.decode(case.prompt.tolist()), tokenizer.decode(case.answer)
        assert split_of(f"lookup value {value}") == "heldout"
        assert case.prompt[0] == tokenizer.bos
        assert words.count(value) == 1
        statement = "holds " + value if case.language == "en" else "号箱里是" + value
        place = words.index(statement)
        text = words[:place].rpartition("\n")[0] + words[place:].partition("\n")[2].rpartition("\n")[0]
        told = len(tokenizer.encode(words[:place].rpartition("\n")[0])) / max(len(tokenizer.encode(text)), 1)
        assert told == pytest.approx(case.depth, abs=0.06)
        assert ("fox" in words) == (case.language == "en")
        texts.setdefault((case.language, case.haystack, case.length), []).append(text)
    for same in texts.values():
        assert len(set(same)) == 1  # over depths the text is the same


def test_a_short_text_begins_again_and_one_without_room_is_refused(tokens_dir, tokenizer):
    long = NeedleGrid(lengths=(4000,), depths=2, cases=1)
    assert len(haystacks(tokens_dir, tokenizer, long).case(0).prompt) == 4000 - 5
    short = NeedleGrid(lengths=(40,), depths=2, cases=1)
    with pytest.raises(ConfigError, match=r"needle\.lengths: in 40 tokens there is no room"):
        haystacks(tokens_dir, tokenizer, short).case(0)


def test_lengths_are_doubled_up_to_the_last_unless_they_are_given():
    assert NeedleGrid().resolve(128, 512) == (128, 256, 512)
    assert NeedleGrid().resolve(1024, 6000) == (1024, 2048, 4096, 6000)
    assert NeedleGrid(lengths=(64, 32)).resolve(32, 128) == (32, 64)
    with pytest.raises(ConfigError, match=r"needle\.lengths: 256 exceeds the last phase's 128"):
        NeedleGrid(lengths=(256,)).resolve(32, 128)


def test_a_model_that_looks_nowhere_ranks_one_digit_in_ten_first(tokens_dir, tokenizer, model):
    grid = NeedleGrid(lengths=(96,), depths=4, cases=25)
    records = find_needles(model, haystacks(tokens_dir, tokenizer, grid), 96 * 64, CPU, ignore, 0)
    interval = bootstrap_mean([record["ranked"] for record in records])
    assert interval.low < CHANCE < interval.high
    assert interval.high - interval.low < 0.08
    assert not any(record["retrieved"] for record in records)


def test_a_model_that_knows_the_cases_retrieves_them_whatever_shares_its_batch(tokens_dir, tokenizer, model):
    made = haystacks(tokens_dir, tokenizer, NeedleGrid(lengths=(96, 110), depths=2, cases=1))
    cases = [made.case(number) for number in range(len(made.cells))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = torch.zeros(())
        for case in cases:
            tokens_T = torch.tensor([*case.prompt.tolist(), *case.answer])
            loss -= model(tokens_T[None, :-1]).log_probs(tokens_T[None, 1:])[0, -5:].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    for tokens_at_once in (1, 220, 10_000):
        records = find_needles(model.eval(), made, tokens_at_once, CPU, ignore, 0)
        assert [(r["length"], r["language"], r["depth"]) for r in records] == [
            (case.length, case.language, case.depth) for case in cases
        ]
        assert all(record["retrieved"] and record["ranked"] == 1 for record in records)
        assert max(record["nats"] for record in records) < 0.05


def test_the_needle_table_pairs_the_same_cases_before_and_after():
    cases = [
        {"language": language, "length": length, "depth": depth, "haystack": haystack}
        for language in ("en", "zh") for length in (8, 16) for depth in (0.0, 1.0) for haystack in range(3)
    ]  # fmt: skip
    before = [case | {"retrieved": False, "ranked": 0.1, "nats": 2.3} for case in cases]
    after = [case | {"retrieved": case["length"] == 8, "ranked": 0.6, "nats": 1.0} for case in cases]
    rows = {(row["length"], row["language"], row["depth"]): row for row in needle_table(before, after)}
    assert len(rows) == 1 + 2 + 2 + 8
    everything = rows["all", "all", "all"]
    assert everything["cases"] == 24
    assert everything["after"]["retrieved"]["mean"] == 0.5
    assert everything["ranked_change"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    cell = rows[8, "zh", 1.0]
    assert cell["cases"] == 3
    assert cell["after"]["retrieved"]["low"] == pytest.approx(3 / (3 + 1.96**2))  # Wilson at 3 of 3
    assert cell["before"]["retrieved"] == pytest.approx({"mean": 0, "low": 0, "high": 1.96**2 / (3 + 1.96**2)})


def test_wilsons_interval_covers_the_truth_and_the_ratio_weighs_clusters():
    rng = np.random.default_rng(0)
    covered = [wilson(int(k), 30) for k in rng.binomial(30, 0.1, 2000)]
    assert 0.92 < np.mean([interval.low <= 0.1 <= interval.high for interval in covered]) < 0.99
    ratio = bootstrap_ratio(np.array([10.0, 0.0]), np.array([10.0, 90.0]))
    assert ratio.mean == pytest.approx(0.1)
    assert (ratio.low, ratio.high) == (0, 1)


EDGES = (0, 16, 32, 64)


def test_losses_fall_into_their_bins_and_add_up(tokens_dir, tokenizer, model):
    loader = PackedLoader(tokens_dir, "validation", 64, 1, 0, documents=LongDocuments())
    bytes_V = np.arange(tokenizer.vocab_size, dtype=float)
    windows = list(range(loader.n_windows))
    losses = window_losses(model, loader, windows, EDGES, bytes_V, CPU, ignore, 0)
    for loss in losses:
        tokens_T = loader.read(np.array([loss.window]))["tokens_BT"][0]
        nats_T = -model(tokens_T[None, :-1]).log_probs(tokens_T[None, 1:])[0].detach()
        assert loss.position[:, 1].tolist() == [16, 16, 32]
        assert loss.position[1, 0] == pytest.approx(float(nats_T[16:32].sum()), rel=1e-5)
        assert loss.position[2, 2] == tokens_T[33:].sum()
        lengths = loader.document_lengths(loss.window)[1:]
        for number, (low, high) in enumerate(((1, 16), (17, 32), (33, math.inf))):
            inside = torch.from_numpy((lengths >= low) & (lengths <= high))
            assert loss.document[number, 1] == int(inside.sum())
            assert loss.document[number, 0] == pytest.approx(float(nats_T[inside].sum()), rel=1e-4, abs=1e-6)
    rows = length_table("position", EDGES, losses, losses)
    assert [row["bin"] for row in rows] == ["0-16", "16-32", "32-64"]
    assert all(row["change"] == {"mean": 0, "low": 0, "high": 0} for row in rows)
    total = sum(row["tokens"] * row["before"]["nats_per_token"]["mean"] for row in rows)
    assert total == pytest.approx(sum(loss.document[:, 0].sum() for loss in losses), rel=1e-6)
    assert [row["bin"] for row in length_table("document", EDGES, losses, losses)][-1] == "32+"


def test_windows_are_half_long_and_spread_over_the_split(tokens_dir):
    loader = PackedLoader(tokens_dir, "validation", 64, 1, 0, documents=LongDocuments())
    n_others = loader.n_windows - loader.n_long
    assert min(loader.n_long, n_others) >= 2
    chosen = spread(loader, 4)
    assert chosen == [0, loader.n_long - 1, loader.n_long, loader.n_windows - 1]
    assert spread(loader, loader.n_windows) == list(range(loader.n_windows))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_work_and_the_report_is_the_same(tokens_dir, tokenizer, model, tmp_path, world, monkeypatch):
    """Each rank alone, one after the other: they have nothing to say to each other."""
    save_model(tmp_path, model, None)
    job = ContextJob(str(tmp_path), str(tokens_dir), (0, 16, 96), 6, GRID, (96,), 500, "fp32", seed=0)

    def measured(n):
        parts = []
        for rank in range(n):
            monkeypatch.setattr(
                "stages.evaluation.context.process_group", lambda r=rank: nullcontext(Ranks(r, n, CPU.device))
            )
            parts.append(measure_context(job, ignore))
        return gather(parts)

    report, whole = (compare(job, m, m) for m in (measured(world), measured(1)))
    assert report == whole
    figures = headline(report)
    assert next(iter(figures)) == "needle_retrieved_96_after"
    assert figures["needle_cases"] == 12


def test_bf16_measures_what_fp32_measures_to_its_precision(tokens_dir, tokenizer, tmp_path):
    torch.manual_seed(0)
    experts = {"n_routed_experts": 4, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 16}
    save_model(
        tmp_path,
        Transformer(
            ModelConfig(
                **{"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64},
                **{"max_position": 96, "init_std": 0.1, **experts},
            )
        ),
        None,
    )
    job = ContextJob(str(tmp_path), str(tokens_dir), (0, 16, 96), 4, GRID, (96,), 500, "fp32", seed=0)
    exact, rounded = (gather([measure_context(replace(job, precision=p), ignore)]) for p in ("fp32", "bf16"))
    for ours, theirs in zip(rounded.losses, exact.losses, strict=True):
        assert ours.position[:, 0] != pytest.approx(theirs.position[:, 0], rel=1e-6)
        assert ours.position[:, 0] == pytest.approx(theirs.position[:, 0], rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_small_model_that_is_shown_lookups_learns_to_find_held_out_ones(tokens_dir, tokenizer):
    """Two layers, no number in common with the cases: at chance for long, then it looks back and finds nearly all."""
    torch.manual_seed(0)
    widths = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 128, "max_position": 128, "init_std": 0.05}
    model = Transformer(ModelConfig(family="llama", vocab_size=tokenizer.vocab_size, **widths))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    made = haystacks(tokens_dir, tokenizer, NeedleGrid(lengths=(112,), depths=5, cases=5))
    text_T = TokenShards(tokens_dir, "validation").read(0, 2000).astype(np.int64)
    rng, ranked = np.random.default_rng(0), []
    for step in range(6000):
        starts = rng.integers(0, len(text_T) - 112, 16)
        tokens_BT = torch.from_numpy(np.stack([plant(text_T[start : start + 112], tokenizer, rng) for start in starts]))
        loss = -model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            records = find_needles(model, made, 112 * 50, CPU, ignore, 0)
            ranked.append(np.mean([record["ranked"] for record in records]))
            print(step, round(float(ranked[-1]), 2), flush=True)
            if ranked[-1] > 0.9:
                break
    assert ranked[0] < 0.2
    assert ranked[-1] > 0.9
    assert np.mean([record["retrieved"] for record in records]) > 0.6
