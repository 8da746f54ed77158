"""What `dpo`, `train_reward_model` and process reward models learn, for the loop of stages/training/examples.py.

Legend: P pairs, E chains, N steps of all of them. [2, P]: chosen, then rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from model.value import ValueModel
from stages.rl.pairs import Pair, pair_batch, reply_logprobs, reply_values
from stages.rl.preference_loss import bradley_terry_loss, dpo_loss, likelihood_loss, preference_margin, step_loss
from stages.rl.reward_model import Target, save_reward_model
from stages.training.checkpoint import load_model, load_value_model, save_model


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation. A pair's constants are the log-probabilities of the reference, the checkpoint."""

    checkpoint: str
    pad: int
    beta: float
    label_smoothing: float = 0.0
    likelihood_weight: float = 0.0

    figures: ClassVar = ("accuracy", "margin", "reward_chosen", "reward_rejected")
    n_constants: ClassVar = 2
    head: ClassVar = True

    def open(self, device: torch.device) -> Transformer:
        """The model without its multi-token-prediction modules, which come back as they were."""
        model = load_model(self.checkpoint, str(device))
        model.mtp, model.config = nn.ModuleList(), model.config.replace(n_mtp=0)
        return model

    def constants(self, model: Transformer, examples: Sequence[Pair]) -> Tensor:
        return reply_logprobs(model, pair_batch(examples, self.pad, model.embedding.weight.device)).T

    def loss(
        self, model: Transformer, examples: Sequence[Pair], constants_EK: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        batch = pair_batch(examples, self.pad, model.embedding.weight.device)
        logprobs_2P, reference_2P = reply_logprobs(model, batch), constants_EK.T
        loss = dpo_loss(preference_margin(*logprobs_2P, *reference_2P), self.beta, count, self.label_smoothing)
        if self.likelihood_weight:
            loss = loss + self.likelihood_weight * likelihood_loss(logprobs_2P[0], batch.lengths_2P[0], count)
        return loss, pair_figures(self.beta * (logprobs_2P - reference_2P))

    def save(self, model: Transformer, directory: str) -> None:
        whole = load_model(self.checkpoint)
        model.mtp, model.config = whole.mtp, whole.config
        save_model(directory, model, self.checkpoint)


@dataclass(frozen=True)
class BradleyTerry:
    """A reward model: the chosen reply's value at its EOS above the rejected one's."""

    checkpoint: str  # a language model, or a reward model that learns on
    pad: int
    target: Target

    figures: ClassVar = ("accuracy", "margin", "reward_chosen", "reward_rejected")
    n_constants: ClassVar = 0
    head: ClassVar = False

    def open(self, device: torch.device) -> ValueModel:
        return load_value_model(self.checkpoint, str(device))

    def constants(self, model: ValueModel, examples: Sequence[Pair]) -> Tensor:
        return torch.empty(len(examples), 0)

    def loss(
        self, model: ValueModel, examples: Sequence[Pair], constants_EK: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        values_2P = reply_values(model, pair_batch(examples, self.pad, model.head.weight.device))
        return bradley_terry_loss(*values_2P, count), pair_figures(values_2P)

    def save(self, model: ValueModel, directory: str) -> None:
        save_reward_model(directory, model, self.target, self.checkpoint)


@dataclass(frozen=True)
class Chain:
    """Token ids of a question and the steps of a reply to it, where each step ends, and how right each is."""

    ids: list[int]
    places: list[int]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Steps:
    """A process reward model: σ of the value at each step's end is how likely the step is right."""

    checkpoint: str  # a language model, or a process reward model that learns on
    pad: int

    figures: ClassVar = ("accuracy", "brier", "label")
    n_constants: ClassVar = 0
    head: ClassVar = False

    def open(self, device: torch.device) -> ValueModel:
        return load_value_model(self.checkpoint, str(device))

    def constants(self, model: ValueModel, examples: Sequence[Chain]) -> Tensor:
        return torch.empty(len(examples), 0)

    def loss(
        self, model: ValueModel, examples: Sequence[Chain], constants_EK: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The figures are means over a chain's steps: which side of ½ is right, squared error, and the labels."""
        tokens_EW = torch.full((len(examples), max(map(len, examples))), self.pad)
        for row, chain in enumerate(examples):  # padded on the right, where no position that counts looks
            tokens_EW[row, : len(chain)] = torch.tensor(chain.ids)
        rows_N = torch.tensor([row for row, chain in enumerate(examples) for _ in chain.places])
        places_N = torch.tensor([place for chain in examples for place in chain.places])
        labels_N = torch.tensor([label for chain in examples for label in chain.labels])
        device = model.head.weight.device
        values_N = model(tokens_EW.to(device))[rows_N.to(device), places_N.to(device)]
        loss = step_loss(values_N, labels_N.to(device), count)
        likely_N = values_N.detach().cpu().sigmoid()
        right_N = ((likely_N > 0.5) == (labels_N > 0.5)).float()
        share_N = 1 / torch.tensor([len(chain.places) for chain in examples])[rows_N]
        figures = torch.stack([right_N, (likely_N - labels_N).square(), labels_N]) @ share_N
        return loss, figures.to(device)

    def save(self, model: ValueModel, directory: str) -> None:
        save_reward_model(directory, model, "steps", self.checkpoint)


def pair_figures(rewards_2P: Tensor) -> Tensor:
    """Sums over pairs: the chosen reply has more reward (a tie is half right), by how much, and both rewards."""
    chosen_P, rejected_P = rewards_2P.detach()
    margin_P = chosen_P - rejected_P
    right_P = (margin_P.sign() + 1) / 2
    return torch.stack([right_P.sum(), margin_P.sum(), chosen_P.sum(), rejected_P.sum()])
