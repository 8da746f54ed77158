"""A real, small tokens artifact and micro models that every training test shares."""

import sys
from pathlib import Path

import pytest

from model.config import ModelConfig
from stages.tokens.bpe import Tokenizer, train
from stages.tokens.shards import ShardWriter, write_index
from stages.training.data import TokenWindows
from stages.training.job import Optimization, TrainJob
from stages.training.schedules import LearningRate

sys.path.insert(0, str(Path(__file__).parent))  # for golden_losses

ENGLISH = "Stage {n} reads artifact {m} and writes artifact {k}; whatever it was given, its result has one name. "
CHINESE = "第{n}个阶段读取第{m}个产物，写出第{k}个产物；同样的输入总是得到同样的名字。"
CODE = "def stage_{n}(a, b):\n    return a * {m} + b * {k}\n"


def texts() -> list[tuple[str, str]]:
    """(language, text) of some documents of uneven lengths."""
    documents = []
    for n in range(120):
        language, line = (("en", ENGLISH), ("zh", CHINESE), ("code", CODE))[n % 3]
        lines = (line.format(n=n, m=n * 7 % 13, k=n * step) for step in range(1 + n % 5))
        documents.append((language, "".join(lines)))
    return documents


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train([text for _, text in texts()], 400)


@pytest.fixture(scope="session")
def tokens_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("tokens")
    tokenizer.save(directory)
    writer = ShardWriter(directory, 0, tokenizer.vocab_size)
    for n, (language, text) in enumerate(texts()):
        ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        names = {"id": f"test/{n}", "language": language, "domain": "test", "source": "test"}
        writer.add(ids, "validation" if n % 8 == 0 else "train", bytes=len(text.encode()), **names)
    write_index(directory, [writer.close()], tokenizer.vocab_size)
    return directory


@pytest.fixture(scope="session")
def micro_v3(tokenizer: Tokenizer) -> ModelConfig:
    """All of V3's parts at the smallest size: MLA, a dense layer, routed and shared experts, MTP."""
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        n_layers=2,
        n_heads=2,
        d_ff=48,
        max_position=32,
        init_std=0.02,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_dense_layers=1,
        n_routed_experts=4,
        n_activated_experts=2,
        n_shared_experts=1,
        moe_d_ff=16,
        n_mtp=1,
    )


@pytest.fixture(scope="session")
def micro_llama(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        d_ff=48,
        max_position=32,
        init_std=0.02,
    )


@pytest.fixture
def make_job(tokens_dir: Path, tmp_path: Path):
    """make_job(model, **changes): a short training job whose files lie under the test's folder."""

    def make(model: ModelConfig, folder: str = "job", options: dict | None = None, **changes) -> TrainJob:
        values = {
            "model": model,
            "optimization": Optimization(
                **{"learning_rate": LearningRate(peak=1e-2, warmup_steps=3), "micro_batch_size": 4, **(options or {})}
            ),
            "data": TokenWindows(str(tokens_dir), 32),
            "steps": 10,
            "batch_size": 8,
            "out": str(tmp_path / folder / "out"),
            "scratch": str(tmp_path / folder / "resume"),
            "tokenizer": str(tokens_dir),
        }
        return TrainJob(**values | changes)

    return make
