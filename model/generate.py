"""Batched sampling with a preallocated KV cache.

Prompts are padded on the left, so every row writes the same cache slot at the same step and a step is one slice
copy a layer; a row's first real slot is remembered and masked before. Rows that have met a stop token are taken out
of the batch (the cache is compacted) as soon as enough have finished to be worth a copy. Which random number decides
which token depends on the prompt's index and the step alone, so batching and compaction never change a sample
beyond rounding. Letters: B rows in the batch, S cache slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.errors import InputError
from model.moe import MoE
from model.rope import rotation
from model.transformer import Block, Transformer

COMPACT_AT = 0.125  # share of finished rows at which a copy of the cache is cheaper than carrying them


@dataclass(frozen=True)
class Completion:
    """What followed one prompt: the tokens (a stop token included), each one's log-probability at the sampling
    temperature before top-p, and whether a stop token ended it (else max_new_tokens did)."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


class Generator:
    """Samples from a model, `max_batch` prompts at a time. Reads the model's weights as they are at each call."""

    def __init__(self, model: Transformer, max_batch: int = 256) -> None:
        self.model, self.max_batch = model, max_batch

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_ids: Collection[int] = (),
        generator: torch.Generator | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order. temperature 0 is greedy (log-probabilities then at temperature 1)."""
        longest = max((len(prompt) for prompt in prompts), default=1)
        if any(len(prompt) == 0 for prompt in prompts):
            raise InputError("cannot generate from an empty prompt: begin it with the BOS token")
        if longest + max_new_tokens > self.model.config.max_position:
            raise InputError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's max_position "
                f"({self.model.config.max_position}): shorten them or extend the context"
            )
        device = self.model.embedding.weight.device
        draws = torch.rand(len(prompts), max_new_tokens, generator=generator, device=device)
        completions: dict[int, Completion] = {}
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # little padding in a batch
        for start in range(0, len(prompts), self.max_batch):
            rows = by_length[start : start + self.max_batch]
            sampler = _Sampler(temperature, top_p, torch.tensor(sorted(stop_ids), device=device), draws[rows])
            batch = _Batch(self.model, [prompts[row] for row in rows], max_new_tokens)
            completions.update(zip(rows, batch.run(sampler), strict=True))
        return [completions[row] for row in range(len(prompts))]


class _Batch:
    """One left-padded batch on its way: cache, first real slot of each row, and what has been sampled."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens
        self.width = max(len(prompt) for prompt in prompts)
        self.blocks: list[Block] = list(model.blocks)
        device, n_slots = model.embedding.weight.device, self.width + max_new_tokens
        dtype = model.embedding.weight.dtype
        self.cache = [block.attention.cache(len(prompts), n_slots).to(dtype) for block in self.blocks]
        self.first_B = torch.tensor([self.width - len(prompt) for prompt in prompts], device=device)
        padded = [[0] * (self.width - len(prompt)) + list(prompt) for prompt in prompts]
        self.prompts_BT = torch.tensor(padded, device=device)
        hidden_BS = torch.arange(n_slots, device=device) < self.first_B[:, None]
        self.mask_BS = torch.zeros(hidden_BS.shape, dtype=dtype, device=device).masked_fill_(hidden_BS, float("-inf"))
        self.tokens_BT = torch.zeros(len(prompts), max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs_BT = torch.zeros(len(prompts), max_new_tokens, device=device)
        self.lengths_B = torch.full((len(prompts),), max_new_tokens, device=device)
        self.finished_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    def run(self, sampler: _Sampler) -> list[Completion]:
        rows_B = torch.arange(len(self.prompts_BT), device=self.prompts_BT.device)  # rows still in the batch
        hidden_BD = self._prefill()
        for step in range(self.max_new_tokens):
            tokens_B, logprobs_B = sampler(self._logits(hidden_BD), rows_B, step)
            self.tokens_BT[rows_B, step], self.logprobs_BT[rows_B, step] = tokens_B, logprobs_B
            stopped_B = torch.isin(tokens_B, sampler.stop_ids) & ~self.finished_B[rows_B]
            self.lengths_B[rows_B[stopped_B]] = step + 1
            self.finished_B[rows_B] |= stopped_B
            going_B = ~self.finished_B[rows_B]
            n_going = int(going_B.sum())
            if n_going == 0 or step + 1 == self.max_new_tokens:
                break
            if n_going <= (1 - COMPACT_AT) * len(rows_B):
                rows_B, tokens_B = rows_B[going_B], tokens_B[going_B]
                self._compact(going_B, self.width + step)
            hidden_BD = self._decode(tokens_B, self.width + step)
        lengths, finished = self.lengths_B.tolist(), self.finished_B.tolist()
        return [
            Completion(tokens[:length], logprobs[:length], done)
            for tokens, logprobs, length, done in zip(
                self.tokens_BT.tolist(), self.logprobs_BT.tolist(), lengths, finished, strict=True
            )
        ]

    def _prefill(self) -> Tensor:
        """Fill the cache with the prompts; returns the last states [B, D]."""
        x_BTD = self.model.embedding(self.prompts_BT)
        positions_T = torch.arange(self.width, device=x_BTD.device)
        rope = rotation(self.model.config, (positions_T - self.first_B[:, None]).clamp_min(0), x_BTD.dtype)
        visible_BT = self.mask_BS[:, : self.width] == 0
        mask_BTT = None
        if bool(self.first_B.any()):
            # A padding query sees itself, or its softmax would be 0/0.
            itself_TT = torch.eye(self.width, dtype=torch.bool, device=x_BTD.device)
            mask_BTT = (visible_BT[:, None, :] & visible_BT[:, :, None]).tril() | itself_TT
        for block, cache in zip(self.blocks, self.cache, strict=True):
            x_BTD = x_BTD + block.attention.prefill(block.attention_norm(x_BTD), rope, mask_BTT, cache)
            h_ND = block.ffn_norm(x_BTD).flatten(0, 1)
            x_BTD = x_BTD + _ffn(block, h_ND, self.prompts_BT.flatten()).view_as(x_BTD)
        return x_BTD[:, -1]

    def _decode(self, tokens_B: Tensor, slot: int) -> Tensor:
        """Run one token per row, kept in `slot`; returns the states [B, D]."""
        x_BD = self.model.embedding(tokens_B)
        rope = rotation(self.model.config, (slot - self.first_B)[:, None], x_BD.dtype)
        mask_BS = self.mask_BS[:, : slot + 1]
        for block, cache in zip(self.blocks, self.cache, strict=True):
            x_BD = x_BD + block.attention.decode(block.attention_norm(x_BD), rope, mask_BS, cache)
            x_BD = x_BD + _ffn(block, block.ffn_norm(x_BD), tokens_B)
        return x_BD

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        return self.model.logits(self.model.norm(hidden_BD))

    def _compact(self, going_B: Tensor, n_slots: int) -> None:
        """Drop rows from everything that a step reads; only the `n_slots` written so far need copying."""
        for layer, cache in enumerate(self.cache):
            kept = cache.new_empty(int(going_B.sum()), *cache.shape[1:])
            kept[..., :n_slots, :] = cache[going_B][..., :n_slots, :]
            self.cache[layer] = kept
        self.first_B, self.mask_BS = self.first_B[going_B], self.mask_BS[going_B]


class _Sampler:
    """Chooses tokens by inverting the cumulative distribution at numbers drawn beforehand, one per prompt and step."""

    def __init__(self, temperature: float, top_p: float, stop_ids: Tensor, draws_BT: Tensor) -> None:
        self.temperature, self.top_p, self.stop_ids, self.draws_BT = temperature, top_p, stop_ids, draws_BT

    def __call__(self, logits_BV: Tensor, rows_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities (fp32) at the sampling temperature, before top-p."""
        if self.temperature == 0:
            probabilities_BV = logits_BV.softmax(-1)
            tokens_B = logits_BV.argmax(-1)
        else:
            draws_B1 = self.draws_BT[rows_B, step, None]
            if self.temperature != 1:
                logits_BV = logits_BV / self.temperature
            probabilities_BV = logits_BV.softmax(-1)
            tokens_B = sample(probabilities_BV, draws_B1, self.top_p)
        return tokens_B, probabilities_BV.gather(1, tokens_B[:, None]).squeeze(1).log()


def sample(probabilities_BV: Tensor, draws_B1: Tensor, top_p: float) -> Tensor:
    """Tokens [B] at the draws' (in [0, 1)) quantiles of each distribution, cut to its top-p nucleus and renormalised.

    The nucleus is the fewest most probable tokens whose probabilities reach top_p (1904.09751).
    """
    if top_p >= 1:
        return _invert(probabilities_BV, draws_B1)
    n_tokens, n_vocabulary = 64, probabilities_BV.shape[1]
    while True:  # a full sort is dear and nuclei are small: look among the 64 best, then 8 times as many
        best_BK, tokens_BK = probabilities_BV.topk(min(n_tokens, n_vocabulary), dim=-1)
        mass_BK = best_BK.cumsum(-1)
        if n_tokens >= n_vocabulary or bool((mass_BK[:, -1] >= top_p).all()):
            break
        n_tokens *= 8
    inside_BK = mass_BK - best_BK < top_p
    return tokens_BK.gather(1, _invert(best_BK * inside_BK, draws_B1)[:, None]).squeeze(1)


def _invert(weights_BV: Tensor, draws_B1: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds the draw's share of the total: never one of weight 0."""
    cumulative_BV = weights_BV.cumsum(-1)
    index_B1 = torch.searchsorted(cumulative_BV, draws_B1 * cumulative_BV[:, -1:], right=True)
    return index_B1.squeeze(1).clamp_max(weights_BV.shape[1] - 1)


def _ffn(block: Block, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
    return block.ffn.decode(x_ND, tokens_N) if isinstance(block.ffn, MoE) else block.ffn(x_ND)
