"""A transformer that gives each position one number: the critic of PPO, and reward models.

Letters: B sequences, T tokens, D model width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.transformer import Transformer


class ValueModel(nn.Module):
    """A scalar head on the states behind the trunk's final norm, in fp32 whatever the trunk computes in.

    The head begins at 0, so that an untrained one values everything alike. The trunk is taken over: what predicts
    tokens, its vocabulary head and its MTP modules, is removed from it.
    """

    def __init__(self, trunk: Transformer) -> None:
        super().__init__()
        trunk.head, trunk.mtp = None, nn.ModuleList()
        trunk.config = trunk.config.replace(n_mtp=0, tie_embeddings=True)  # what a trunk without a head is built from
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.d_model, 1, device=trunk.embedding.weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def config(self) -> ModelConfig:
        """The trunk's."""
        return self.trunk.config

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, document_BT: Tensor | None = None
    ) -> Tensor:
        """[B, T] fp32: the value at each token of what was read up to it. Arguments are `Transformer.forward`'s."""
        hidden_BTD = self.trunk(tokens_BT, positions_BT, document_BT).hidden_BTD
        return F.linear(hidden_BTD.float(), self.head.weight, self.head.bias).squeeze(-1)
