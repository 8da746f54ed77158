"""The average of the weights: the recurrence that it should be, wherever the weights are."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infra.errors import ConfigError
from stages.training.distributed import process_group
from stages.training.ema import WeightAverage
from stages.training.job import Optimization
from stages.training.launch import summarize
from stages.training.trainer import Trainer, train
from stages.training.validation import Validation

DECAY = 0.9


def ignore(done: int, total: int, unit: str, **metrics: float) -> None:
    """A report that nobody reads."""


def follow_and_compare(device: str, dtype: torch.dtype, matrix: tuple[int, int]) -> None:
    torch.manual_seed(0)
    sizes = {"matrix": matrix, "vector": (7,)}
    weights = {name: torch.nn.Parameter(torch.randn(size, device=device).to(dtype)) for name, size in sizes.items()}
    average = WeightAverage(weights, DECAY)
    expected = {name: weight.detach().double().cpu() for name, weight in weights.items()}
    for _ in range(40):
        average.before_change()
        for weight in weights.values():
            weight.data += 0.1 * torch.randn_like(weight)
        average.follow(weights.values())
        for name, weight in weights.items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weight.detach().double().cpu()
    for name, value in average.state_dict().items():
        assert value.device.type == "cpu"
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_recurrence_in_fp64_but_for_rounding(dtype):
    follow_and_compare("cpu", dtype, (64, 33))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_it_keeps_up_with_weights_that_change_at_once(dtype):
    follow_and_compare("cuda", dtype, (4096, 4096))  # so long to copy that the next change would overtake it


def test_lent_weights_come_back_to_the_last_bit_even_after_an_error():
    weight = torch.nn.Parameter(torch.randn(5))
    average = WeightAverage({"w": weight}, DECAY)
    before = weight.detach().clone()
    weight.data += 1
    average.follow([weight])
    after = weight.detach().clone()
    with suppress(KeyboardInterrupt), average.lent({"w": weight}):
        torch.testing.assert_close(weight.detach(), before + 0.1)
        raise KeyboardInterrupt
    assert torch.equal(weight, after)


def test_a_step_that_is_refused_does_not_move_it(make_job, micro_llama):
    with process_group() as ranks:
        trainer = Trainer(make_job(micro_llama, options={"ema_decay": DECAY}), ranks)
        trainer.step()
        before = {name: value.clone() for name, value in trainer.average.state_dict().items()}
        trainer.model.blocks[0].ffn.down.weight.data[0, 0] = float("nan")
        trainer.step()
        assert all(torch.equal(before[name], value) for name, value in trainer.average.state_dict().items())


def test_validation_measures_both_and_the_checkpoint_holds_the_one_asked_for(make_job, micro_v3, tokens_dir):
    changes = {"validation": Validation(str(tokens_dir), 32, windows=2, every=10), "steps": 20}
    last, plain = make_job(micro_v3, "last", {"ema_decay": DECAY}, **changes), make_job(micro_v3, "plain", **changes)
    ema = make_job(micro_v3, "ema", {"ema_decay": DECAY, "checkpoint_weights": "ema"}, **changes)
    results = {name: train(job, ignore) for name, job in (("last", last), ("plain", plain), ("ema", ema))}
    assert results["last"].values("loss") == results["plain"].values("loss")
    for language in ("en", "zh", "code"):
        lagging = results["last"].values(f"ema_bits_per_byte_{language}")
        now = results["last"].values(f"bits_per_byte_{language}")
        assert lagging[0] == now[0]
        assert lagging[-1][1] > now[-1][1]  # the average of a model that learns this fast is behind it
    weights = {job: load_file(Path(job.out) / "model.safetensors") for job in (last, plain, ema)}
    assert all(torch.equal(weights[last][name], weights[plain][name]) for name in weights[last])
    assert not torch.equal(weights[ema]["head.weight"], weights[last]["head.weight"])
    assert torch.equal(weights[ema]["blocks.1.ffn.router.bias"], weights[last]["blocks.1.ffn.router.bias"])
    told = summarize(ema, results["ema"])["bits_per_byte_en"]
    assert told == results["ema"].last("ema_bits_per_byte_en")


def test_a_checkpoint_of_an_average_that_is_not_kept_is_refused():
    with pytest.raises(ConfigError, match="checkpoint_weights='ema' needs an average: set ema_decay"):
        Optimization.parse({"learning_rate": {"peak": 1e-3}, "checkpoint_weights": "ema"})
