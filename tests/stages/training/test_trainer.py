"""The loop itself: what must not change its losses, and what it refuses."""

import math
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from infra.errors import ConfigError
from kernels.fp8 import reference
from model.router import Router
from stages.training.checkpoint import load_model
from stages.training.data import TokenWindows
from stages.training.distributed import GradientBucket, clip_factor, process_group
from stages.training.schedules import BatchRamp
from stages.training.trainer import Trainer, TrainingDiverged, train
from stages.training.validation import PADDING, Validation, bits_per_byte


def ignore(done: int, total: int, unit: str, **metrics: float) -> None:
    """A report that nobody reads."""


def losses_of(result) -> list[float]:
    return [loss for _, loss in result.values("loss")]


def test_accumulation_changes_rounding_alone(make_job, micro_v3):
    whole = train(make_job(micro_v3, "whole"), ignore)
    job = make_job(micro_v3, "parts")
    parts = train(replace(job, optimization=job.optimization.replace(micro_batch_size=1)), ignore)
    torch.testing.assert_close(losses_of(parts), losses_of(whole), rtol=1e-4, atol=1e-4)


TRAIN = """
import pickle
from stages.training.trainer import train

result = train(job, lambda *args, **metrics: None)
(folder / f"result-{environment.get('RANK', 0)}.pickle").write_bytes(pickle.dumps(result))
"""


def test_two_ranks_train_the_model_that_one_rank_trains(make_job, micro_v3, tokens_dir, run_ranks, tmp_path):
    validation = Validation(str(tokens_dir), 32, windows=3, every=5)
    one = train(make_job(micro_v3, "one", validation=validation), ignore)
    job = make_job(micro_v3, "two", validation=validation)
    run_ranks(TRAIN, world=2, job=job, folder=tmp_path)
    two = pickle.loads((tmp_path / "result-0.pickle").read_bytes())
    assert two.world == 2
    torch.testing.assert_close(losses_of(two), losses_of(one), rtol=1e-4, atol=1e-4)
    loads = [torch.tensor([row["load"] for row in result.health["rows"][:5]]).sum(0) for result in (two, one)]
    assert (loads[0] - loads[1]).abs().max() <= 2  # of some 600: rounding may send a token elsewhere
    for language in ("code", "en", "zh"):
        ours, theirs = two.values(f"bits_per_byte_{language}"), one.values(f"bits_per_byte_{language}")
        assert ours == [(step, pytest.approx(value, rel=1e-3)) for step, value in theirs]


def test_the_micro_model_learns_and_every_language_gets_cheaper(make_job, micro_v3, tokens_dir):
    validation = Validation(str(tokens_dir), 32, windows=3, every=20)
    result = train(make_job(micro_v3, steps=60, validation=validation), ignore)
    assert result.languages == ["code", "en", "zh"]
    for language in result.languages:
        values = [value for _, value in result.values(f"bits_per_byte_{language}")]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
    assert result.flops == micro_v3.flops_per_token(32, mtp=True) * 60 * 8 * 32


def test_a_uniform_model_costs_log_vocabulary_bits_per_token_in_bits_per_byte(make_job, micro_llama, tokens_dir):
    """With a zero head every token costs log2 V bits, so bits per byte is exactly V's bits × tokens / bytes."""
    job = make_job(micro_llama, validation=Validation(str(tokens_dir), 32, windows=3, every=5))
    with process_group() as ranks:
        trainer = Trainer(job, ranks)
        torch.nn.init.zeros_(trainer.model.head.weight)
        found = bits_per_byte(trainer.model, trainer.sets, ranks, 4)
        for chosen in trainer.sets:
            expected = math.log2(micro_llama.vocab_size) * int(chosen.mask_NT.sum()) / chosen.n_bytes
            assert found[chosen.language] == pytest.approx(expected, rel=1e-6)


def test_a_validation_document_costs_what_it_costs_alone(make_job, micro_v3, tokens_dir):
    job = make_job(
        micro_v3.replace(max_position=4096), validation=Validation(str(tokens_dir), 4096, windows=1, every=5)
    )
    with process_group() as ranks:
        trainer = Trainer(job, ranks)
        found = bits_per_byte(trainer.model, trainer.sets, ranks, 1)
        for chosen in trainer.sets:
            tokens_T, document_T = chosen.tokens_NT[0], chosen.document_NT[0]
            numbers = [number for number in document_T.unique().tolist() if number != PADDING]
            assert len(chosen.tokens_NT) == 1 < len(numbers)
            nats = 0.0
            for number in numbers:
                alone_T = tokens_T[document_T == number]
                with torch.no_grad():
                    nats -= trainer.model(alone_T[None, :-1]).log_probs(alone_T[None, 1:]).sum().item()
            assert found[chosen.language] == pytest.approx(nats / math.log(2) / chosen.n_bytes, rel=1e-5)


def test_routing_biases_move_towards_balance_and_freeze_at_the_end(make_job, micro_v3):
    job = make_job(micro_v3, options={"bias_update_speed": 0.01}, steps=60)
    with process_group() as ranks:
        trainer = Trainer(job, ranks)
        router = next(module for module in trainer.model.modules() if isinstance(module, Router))
        assert trainer.step()["bias_drift"] == 0  # of the biases that the step chose by
        assert router.bias.abs().max() == pytest.approx(0.01)
        trainer.progress.tokens = int(0.97 * trainer.total_tokens)  # beyond 14.3T of 14.8T
        before = router.bias.clone()
        assert trainer.step()["bias_drift"] == pytest.approx(0.01)
        assert torch.equal(router.bias, before)


def test_dropping_is_reported_never_measured_with_and_the_same_in_any_micro_batch(make_job, micro_v3, tokens_dir):
    model = micro_v3.replace(n_groups=2, n_limited_groups=1, capacity_factor=1.0)
    validation = Validation(str(tokens_dir), 32, windows=2, every=5)
    whole = train(make_job(model, "whole", steps=5, validation=validation), ignore)
    job = make_job(model, "parts", steps=5, validation=validation)
    parts = train(replace(job, optimization=job.optimization.replace(micro_batch_size=1)), ignore)
    torch.testing.assert_close(losses_of(parts), losses_of(whole), rtol=1e-4, atol=1e-4)
    rates = [rate for _, rate in whole.values("drop_rate")]
    assert rates == pytest.approx([rate for _, rate in parts.values("drop_rate")], abs=0.002)
    assert 0.05 < rates[0] < 0.5
    # Before the first step both models are the same, so a measurement that dropped would differ.
    undropped = train(make_job(model.replace(capacity_factor=None), "all", steps=5, validation=validation), ignore)
    assert whole.values("bits_per_byte_en")[0] == undropped.values("bits_per_byte_en")[0]
    assert losses_of(whole)[0] != losses_of(undropped)[0]
    assert "drop_rate" not in undropped.progress.rows[-1]


def test_v2s_balance_losses_are_weighed_apart_and_added(make_job, micro_v3):
    model = micro_v3.replace(score_function="softmax", n_groups=2, n_limited_groups=1, n_mtp=0)
    alphas = {"balance_alpha": 0.003, "device_balance_alpha": 0.05, "communication_balance_alpha": 0.02}
    none = dict.fromkeys(alphas, 0.0)
    chosen = [*({**none, name: alpha} for name, alpha in alphas.items()), alphas]
    with process_group() as ranks:
        steps = [Trainer(make_job(model, str(n), options), ranks).step() for n, options in enumerate(chosen)]
    *parts, total = (row["balance_loss"] for row in steps)
    assert all(parts)
    assert total == pytest.approx(sum(parts), rel=1e-5)


def test_a_step_that_is_not_finite_is_refused_and_a_few_in_a_row_end_the_run(make_job, micro_llama):
    with process_group() as ranks:
        trainer = Trainer(make_job(micro_llama), ranks)
        good = trainer.model.blocks[0].ffn.down.weight.detach().clone()
        trainer.model.blocks[0].ffn.down.weight.data[0, 0] = float("nan")
        weights = trainer.model.embedding.weight.detach().clone()
        trainer.step()
        trainer.step()
        assert torch.equal(trainer.model.embedding.weight, weights)
        assert trainer.progress.skipped == 2
        with pytest.raises(TrainingDiverged, match=r"step 3: loss nan.*lower learning_rate\.peak"):
            trainer.step()
        trainer.model.blocks[0].ffn.down.weight.data.copy_(good)
        trainer.step()
        assert trainer.progress.skipped_in_row == 0
        assert not torch.equal(trainer.model.embedding.weight, weights)


def test_how_many_steps_may_be_refused_in_a_row_is_the_configs(make_job, micro_llama):
    with process_group() as ranks:
        trainer = Trainer(make_job(micro_llama, options={"max_skipped_steps": 1}), ranks)
        trainer.model.blocks[0].ffn.down.weight.data[0, 0] = float("inf")
        with pytest.raises(TrainingDiverged, match="1 steps in a row"):
            trainer.step()


def test_what_is_random_in_a_step_is_a_function_of_seed_step_and_rank(make_job, micro_llama):
    """So there is no generator's state to save: noise in the forward pass is the same after a resume."""

    def noisy(job, until: int = 10) -> list[float]:
        def stop(done: int, *args, **metrics) -> None:
            if done == until:
                raise KeyboardInterrupt

        with process_group() as ranks:
            trainer = Trainer(job, ranks)
            trainer.model.norm.register_forward_hook(lambda module, x, y: y + 0.1 * torch.randn_like(y))
            torch.rand(trainer.progress.step + 1)  # whatever was drawn before
            with suppress(KeyboardInterrupt):
                trainer.run(stop)
            return [row["loss"] for row in trainer.progress.rows]

    whole = noisy(make_job(micro_llama, "whole"))
    killed = make_job(micro_llama, "killed", save_every=4)
    assert noisy(killed, until=6) == whole[:6]
    assert noisy(killed) == whole


def test_a_batch_ramp_consumes_every_window_once(make_job, micro_llama):
    read = []
    with process_group() as ranks:
        trainer = Trainer(make_job(micro_llama, batch_ramp=BatchRamp(start=2, until=1.0)), ranks)
        windows = trainer.batches
        trainer.batches = SimpleNamespace(batch=lambda number: read.append(number) or windows.batch(number))
        trainer.run(ignore)
    assert read == list(range(len(read)))
    assert sum(trainer.batch_sizes) == 2 * len(read)
    assert trainer.batch_sizes[0] == 2
    assert trainer.batch_sizes[-1] == 6


def test_the_checkpoint_holds_the_trained_weights(make_job, micro_v3):
    job = make_job(micro_v3, steps=2)
    train(job, ignore)
    model = load_model(job.out)
    with process_group() as ranks:
        trainer = Trainer(replace(job, scratch=job.scratch + "-other"), ranks)
        trainer.run(ignore)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.config == micro_v3
    assert (Path(job.out) / "tokenizer_config.json").is_file()


def test_tied_embeddings_are_written_once_and_load_tied(make_job, micro_llama):
    job = make_job(micro_llama.replace(tie_embeddings=True), steps=1)
    train(job, ignore)
    assert "head.weight" not in load_file(Path(job.out) / "model.safetensors")
    model = load_model(job.out)
    assert model.head_weight is model.embedding.weight


def test_bf16_keeps_fp32_weights_and_stays_near_fp32(make_job, micro_v3):
    fp32 = train(make_job(micro_v3, "fp32"), ignore)
    bf16 = train(make_job(micro_v3, "bf16", options={"precision": "bf16"}), ignore)
    assert load_model(make_job(micro_v3, "bf16").out).embedding.weight.dtype == torch.float32
    assert losses_of(bf16) != losses_of(fp32)
    torch.testing.assert_close(losses_of(bf16), losses_of(fp32), rtol=0.01, atol=0)


@pytest.fixture
def wide_v3(micro_v3):
    """`micro_v3` with the widths that float8 asks for."""
    return micro_v3.replace(qk_rope_head_dim=16)


def test_fp8_stays_near_bf16_and_goes_on_to_the_bit(make_job, wide_v3):
    bf16 = train(make_job(wide_v3, "bf16", options={"precision": "bf16"}), ignore)
    options = {"precision": "fp8", "micro_batch_size": 2}
    fp8 = train(make_job(wide_v3, "fp8", options=options), ignore)
    assert losses_of(fp8) != losses_of(bf16)
    torch.testing.assert_close(losses_of(fp8), losses_of(bf16), rtol=0.02, atol=0)

    job = make_job(wide_v3, "stopped", options=options)
    with process_group() as ranks, suppress(KeyboardInterrupt):

        def stop(done: int, total: int, unit: str, **metrics: float) -> None:
            if done == job.steps // 2:
                raise KeyboardInterrupt

        Trainer(replace(job, save_every=1), ranks).run(stop)
    assert losses_of(train(job, ignore)) == losses_of(fp8)


def test_fp8_quantises_a_weight_once_a_step_and_never_the_head(make_job, wide_v3, monkeypatch):
    seen = []
    quantize = reference.quantize_weight
    monkeypatch.setattr(
        reference, "quantize_weight", lambda w, **options: seen.append(w.data_ptr()) or quantize(w, **options)
    )
    options = {"precision": "fp8", "micro_batch_size": 2}
    with process_group() as ranks:
        trainer = Trainer(make_job(wide_v3, options=options), ranks)
        trainer.step()
        first = list(seen)
        assert len(first) == len(set(first)) > 10
        exact = {trainer.model.head_weight.data_ptr(), trainer.model.embedding.weight.data_ptr()}
        exact |= {module.weight.data_ptr() for module in trainer.model.modules() if isinstance(module, Router)}
        assert not exact & set(first)
        trainer.step()
        assert seen == first * 2
        trainer.model.eval()
        trainer.model(torch.zeros(1, 8, dtype=torch.int64))
        assert seen == first * 2, "a model that is not training computes with its weights as they are"


def test_fp8_names_the_width_that_it_cannot_multiply(make_job, micro_v3):
    job = make_job(micro_v3, options={"precision": "fp8"})
    refusal = r"attention.qkv.weight is \[40, 32\].*multiples of 16"
    with process_group() as ranks, pytest.raises(ConfigError, match=refusal):
        Trainer(job, ranks)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("micro_batch", [2, 8])
@pytest.mark.parametrize(("masked", "recompute"), [(False, ()), (True, ()), (False, ("block",)), (True, ("swiglu",))])
def test_a_replayed_step_is_the_step(make_job, wide_v3, precision, micro_batch, masked, recompute):
    runs = []
    shared = {"precision": precision, "micro_batch_size": micro_batch, "recompute": recompute}
    for graphs in (False, True):
        options = {**shared, "cuda_graphs": graphs}
        job = make_job(wide_v3, f"graphs-{graphs}", options=options)
        runs.append(train(replace(job, data=replace(job.data, mask_documents=masked)), ignore))
    # Under a mask a recorded pass brings the head more rows, and sums them in other chunks.
    torch.testing.assert_close(losses_of(runs[0]), losses_of(runs[1]), rtol=1e-3 if masked else 0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_two_gpus_replay_the_steps_that_they_take(make_job, wide_v3, run_ranks, tmp_path, precision):
    runs = []
    for graphs in (False, True):
        job = make_job(wide_v3, f"graphs-{graphs}", options={"precision": precision, "cuda_graphs": graphs})
        run_ranks(TRAIN, job=job, folder=tmp_path)
        runs.append(pickle.loads((tmp_path / "result-0.pickle").read_bytes()))
    alone = train(make_job(wide_v3, "alone", options={"precision": precision}), ignore)
    assert runs[0].world == 2
    assert losses_of(runs[0]) == losses_of(runs[1])
    torch.testing.assert_close(losses_of(runs[0]), losses_of(alone), rtol=1e-2, atol=0)


@pytest.mark.parametrize("sums", [True, False])
def test_the_bucket_knows_the_joint_norm_of_gradients_of_both_precisions(sums):
    exact, low = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    bucket = GradientBucket([exact, low], n_statistics=1, sums=sums)
    for _ in range(2):  # what is zeroed is gone
        bucket.zero()
        for _ in range(2 if sums else 1):
            (exact.sum() * 3 - low.sum() * 2).backward()
            bucket.collect()
    bucket.statistics.fill_(100.0)
    times = 2 if sums else 1
    assert bucket.norm() == pytest.approx(times * math.sqrt(3 * 9 + 4 * 4))
    assert (low.main_grad.tolist() if sums else low.grad.tolist()) == [[-2.0 * times] * 2] * 2
    assert clip_factor(bucket.norm(), 1.0) == pytest.approx(1 / bucket.norm())
    assert clip_factor(0.5, 1.0) == 1.0


def test_a_sequence_longer_than_the_corpus_is_refused(make_job, micro_llama, tokens_dir):
    with pytest.raises(ConfigError, match="shorten sequence_length"):
        train(make_job(micro_llama, data=TokenWindows(str(tokens_dir), 10**6)), ignore)
