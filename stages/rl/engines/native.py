"""The embedded engine: our own batched generator in the learner's process, on the model that it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from model.generate import Generator
from model.transformer import Transformer
from stages.rl.engines.base import Reply, Sampling

CACHE_SHARE = 0.2  # of a GPU's memory: the learner lives there too
MOST_ROWS = 2048


class NativeEngine:
    """Generates with `model` as it is at the moment of the call: a learner that shares it has nothing to send."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._generator = Generator(model)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Reply]:
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            tokens = max(map(len, prompts), default=0) + sampling.max_new_tokens
            self._generator.max_batch = _rows_of(self._model, tokens)
        completions = self._generator.generate(
            list(prompts),
            sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_ids=sampling.stop_ids,
            generator=torch.Generator(device).manual_seed(seed),
        )
        return [Reply(list(c.tokens), [float(p) for p in c.logprobs], c.finished) for c in completions]

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = self._model.state_dict()
        for name, tensor in named_tensors:
            if own[name].data_ptr() != tensor.data_ptr():  # shared weights are up to date already
                own[name].copy_(tensor)


def _rows_of(model: Transformer, tokens: int) -> int:
    """How many rows of so many tokens have room in their share of the GPU, a power of two."""
    weight = model.embedding.weight
    bytes_per_row = tokens * model.config.cache_bytes_per_token(weight.element_size())
    rows = int(CACHE_SHARE * torch.cuda.get_device_properties(weight.device).total_memory / bytes_per_row)
    return min(max(1 << (max(rows, 1).bit_length() - 1), 1), MOST_ROWS)
