"""A student that learns what a teacher would say next, by its whole distribution and not by one sampled token.

On the conversations as they are, this is the distillation of logits (Hinton et al. 2015, 1503.02531). On policy, the
student answers the same prompts anew at every step and the teacher grades its replies token by token (GKD, Agarwal et
al. 2023, 2306.13649, algorithm 1; so Qwen3's small models, 2505.09388, section 4.5). As there, no gradient flows
through the sampling. With the reverse KL that is the mean of the per-token reward log p − log q over what the student
could have said at each place, where a policy gradient has the one token that it did say.

Legend: B rows, T positions, N graded places, D width of the student, E of the teacher, V shared vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random

import numpy as np
import torch
from torch import Tensor

import kernels
from infra.errors import InputError
from infra.metrics import Report
from model.transformer import Transformer
from stages.rl.engines.base import Sampling
from stages.rl.engines.native import NativeEngine
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_model
from stages.training.data import Batch, pack_rows
from stages.training.distributed import Ranks, process_group
from stages.training.job import TrainJob, TrainResult
from stages.training.losses import target_mask
from stages.training.trainer import Trainer


def teach(job: TrainJob, report: Report) -> TrainResult:
    """As `stages.training.trainer.train`, for a job with a lesson. `TrainResult.flops` is the student's part; a row
    of progress has that of the teacher as `teacher_flops`."""
    with process_group() as ranks:
        return Distiller(job, ranks).finish(report)


class Distiller(Trainer):
    def __init__(self, job: TrainJob, ranks: Ranks) -> None:
        super().__init__(job, ranks)
        assert job.lesson is not None and job.tokenizer is not None
        self.lesson = job.lesson
        assert not (self.lesson.on_policy and ranks.world > 1), "replies are one rank's, whatever machine it is on"
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.teacher = load_teacher(self.lesson.teacher, ranks.device, rounded=job.optimization.precision != "fp32")
        self.engine = NativeEngine(self.model)

    def finish(self, report: Report) -> TrainResult:
        result = super().finish(report)
        flops = sum(value for _, value in result.values("student_flops"))
        return TrainResult(result.progress, flops, result.world, result.health)

    def step(self) -> dict[str, float]:
        self.read_tokens = self.sampled_tokens = 0
        row = super().step()
        length = self.job.data.sequence_length
        read, sampled = self.ranks.all_reduce(
            torch.tensor([self.read_tokens, self.sampled_tokens], dtype=torch.float64, device=self.ranks.device)
        ).tolist()
        student, teacher = (model.config.flops_per_token(length) for model in (self.model, self.teacher))
        flops = {"student_flops": student * (read + sampled / 3), "teacher_flops": teacher / 3 * read}
        return row | {name: float(value) for name, value in flops.items()}

    def loss_sum(self, depth: int, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """Σ of the divergences at the places whose next token the student is to learn."""
        if depth:
            return super().loss_sum(depth, hidden_BTD, batch)
        mask_BT = target_mask(batch.loss_mask_BT, batch.document_BT)
        with torch.no_grad():
            tokens_BT, _, document_BT, positions_BT = (None if x is None else x[:, :-1] for x in batch)
            teacher_BTE = self.teacher(tokens_BT, positions_BT, document_BT).hidden_BTD
        self.read_tokens += hidden_BTD.shape[:2].numel()
        # Models of one family may pad their vocabularies to different sizes: what counts is what the tokenizer has.
        size = self.tokenizer.vocab_size
        return kernels.linear_divergence(
            hidden_BTD[mask_BT],
            self.model.head_weight[:size],
            teacher_BTE[mask_BT],
            self.teacher.head_weight[:size],
            self.lesson.beta,
            self.lesson.temperature,
        )

    def _read(self, sequences: int) -> list[Batch]:
        batches = super()._read(sequences)
        if not self.lesson.on_policy:
            return batches
        seed = Random(f"{self.job.optimization.seed}/{self.progress.step}/replies").getrandbits(62)
        prompts = [prompt for batch in batches for prompt in _prompts(batch)]
        sampling = Sampling(self.lesson.max_new_tokens, stop_ids=(self.tokenizer.eos,))
        replies = [self._known(reply.tokens) for reply in self.engine.generate(prompts, sampling, seed)]
        self.sampled_tokens += sum(map(len, prompts)) + sum(map(len, replies))
        examples = [
            ([*prompt, *reply], [0] * len(prompt) + [1] * len(reply))
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        width = max(len(ids) for ids, _ in examples)
        return list(self._cut(pack_rows(examples, max(width, self.job.data.sequence_length + 1), self.tokenizer.pad)))

    def _known(self, tokens: list[int]) -> list[int]:
        """The reply up to the first id that stands for no token: padding of the vocabulary, which no teacher reads."""
        return list(itertools.takewhile(lambda token: token < self.tokenizer.vocab_size, tokens))

    def _cut(self, arrays: dict[str, np.ndarray]) -> Iterator[Batch]:
        """Packed rows as micro-batches, on the device."""
        names = ("tokens", "loss_mask", "document", "position")
        rows = [torch.from_numpy(arrays[name].astype(np.int64)) for name in names]
        for parts in zip(*(x.split(self.micro_batch // self.ranks.world) for x in rows), strict=True):
            yield Batch(*parts).to(self.ranks.device)


def _prompts(batch: Batch) -> Iterator[list[int]]:
    """What stands before the last reply of every conversation in the packed rows."""
    assert batch.loss_mask_BT is not None and batch.document_BT is not None
    rows = (batch.tokens_BT.tolist(), batch.loss_mask_BT.tolist(), batch.document_BT.tolist())
    for tokens, mask, document in zip(*rows, strict=True):
        for number in range(document[-1] + 1):
            here = [place for place, owner in enumerate(document) if owner == number]
            learnt = [place for place in here if mask[place]]
            if not learnt:  # the padding at the row's end
                continue
            start = learnt[-1]
            while start > here[0] and mask[start - 1]:
                start -= 1
            yield tokens[here[0] : start]


def load_teacher(directory: str, device: torch.device, rounded: bool) -> Transformer:
    """A frozen model that reads; bf16 but for norms and gates if `rounded`, as the student trains then."""
    model = load_model(directory, str(device)).requires_grad_(False)
    model.mtp, model.config = torch.nn.ModuleList(), model.config.replace(n_mtp=0)
    return model.round_weights() if rounded else model


def require_same_tokenizer(student: str, teacher: str) -> None:
    """InputError unless every id means the same bytes to both: a distribution can be compared to no other."""
    ours, theirs = (load_tokenizer(directory).tokens() for directory in (student, teacher))
    if ours != theirs:
        differing = len(ours.items() ^ theirs.items())
        raise InputError(
            f"the teacher's tokenizer is not the student's: they differ in {differing} pairs of token and id; "
            "set method=sft, or give a student that was made with the teacher's tokenizer"
        )
