"""The embedded engine: our own batched generator on the learner's own weights, in the learner's process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from model.generate import Generator
from model.transformer import Transformer
from stages.rl.engines.base import Reply, Sampling


class NativeEngine:
    """Generates with `model` as it is at the moment of the call: a learner that shares it has nothing to send."""

    def __init__(self, model: Transformer, max_batch: int = 256) -> None:
        self._model, self._max_batch = model, max_batch

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Reply]:
        device = next(self._model.parameters()).device
        completions = Generator(self._model, max_batch=self._max_batch).generate(
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
