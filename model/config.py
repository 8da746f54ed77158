"""The architecture as one config, and what it costs, known before anything is built.

`family` names the published layout and with it the block's shape:

- `deepseek_v3`: multi-head latent attention and a mixture of experts (DeepSeek-MoE, V2, V3; R1 shares V3's).
  Without `kv_lora_rank` the attention is plain multi-head, which is DeepSeekMoE-16B; without routed experts every
  FFN is dense.
- `llama`: grouped-query attention, dense FFN (DeepSeek LLM 7B and 67B, the Llama students).
- `qwen2`: llama with biases on the query, key and value projections (the Qwen students).
- `qwen3`: llama with an RMSNorm on each query and key head before RoPE.

Field names are the papers' and the field's (DeepSeek-V3's inference code, the published config.json).
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from infra.config import Config, Field


class ModelConfig(Config):
    """Shape of a decoder-only transformer. `n_kv_heads` and `head_dim` default from the other widths."""

    family: Literal["deepseek_v3", "llama", "qwen2", "qwen3"] = Field("deepseek_v3", title="Family")
    vocab_size: int = Field(4096, title="Vocabulary size", ge=2)
    d_model: int = Field(128, title="Model width", ge=1)
    n_layers: int = Field(4, title="Layers", ge=1)
    n_heads: int = Field(4, title="Attention heads", ge=1)
    n_kv_heads: int = Field(4, title="Key/value heads", ge=1, description="Grouped-query attention; default n_heads")
    head_dim: int = Field(32, title="Head width", ge=1, description="Default d_model / n_heads; derived for MLA")
    d_ff: int = Field(384, title="Dense FFN width", ge=1)
    max_position: int = Field(1024, title="Longest context", ge=1, description="Tokens, after any YaRN extension")
    norm_eps: float = Field(1e-6, title="RMSNorm epsilon", gt=0)
    init_std: float = Field(0.006, title="Initial weight deviation", gt=0)
    tie_embeddings: bool = Field(False, title="Tie embedding and head")

    rope_theta: float = Field(10000.0, title="RoPE base", gt=0)
    rope_factor: float = Field(1.0, title="YaRN scale", ge=1, description="s = new / original context; 1 = no YaRN")
    original_max_position: int | None = Field(None, title="Context before YaRN", ge=1)
    beta_fast: float = Field(32.0, title="YaRN beta", gt=0, description="Rotations above which a dimension is kept")
    beta_slow: float = Field(1.0, title="YaRN alpha", gt=0, description="Rotations below which it is interpolated")
    mscale: float = Field(1.0, title="YaRN mscale", gt=0, description="MLA: weight of ln s in the cosines' factor")
    mscale_all_dim: float = Field(1.0, title="YaRN mscale_all_dim", ge=0, description="MLA: in the softmax scale")

    q_lora_rank: int | None = Field(None, title="Query latent width", ge=1, description="None: no query compression")
    kv_lora_rank: int | None = Field(None, title="Key/value latent width", ge=1, description="None: not MLA")
    qk_nope_head_dim: int | None = Field(None, title="Query/key width without RoPE", ge=1)
    qk_rope_head_dim: int | None = Field(None, title="Decoupled RoPE width", ge=2)
    v_head_dim: int | None = Field(None, title="Value head width", ge=1)

    n_dense_layers: int = Field(0, title="Dense layers first", ge=0, description="Used only with routed experts")
    n_routed_experts: int = Field(0, title="Routed experts", ge=0, description="0: every FFN is dense")
    n_activated_experts: int = Field(0, title="Routed experts per token", ge=0)
    n_shared_experts: int = Field(0, title="Shared experts", ge=0)
    moe_d_ff: int = Field(0, title="Expert FFN width", ge=0)
    n_groups: int = Field(1, title="Expert groups", ge=1)
    n_limited_groups: int = Field(1, title="Groups a token may use", ge=1)
    score_function: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        title="Gate",
        description="sigmoid: V3 (renormalised gates, groups by their two best); softmax: MoE and V2 (groups by best)",
    )
    route_scale: float = Field(1.0, title="Routed scaling factor", gt=0)
    router: Literal["deepseek", "gshard", "switch", "hash"] = Field(
        "deepseek",
        title="Router",
        description="deepseek, or one of DeepSeekMoE's baselines: gshard (top 2), switch (top 1), hash (of the token)",
    )
    capacity_factor: float | None = Field(
        None,
        title="Capacity factor",
        gt=0,
        description="In training, rows over this multiple of even load are dropped: a group's (V2: 1) or an expert's",
    )
    n_mtp: int = Field(0, title="Multi-token prediction depth", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        fields = cls.model_fields
        d_model, n_heads = (values.get(name, fields[name].default) for name in ("d_model", "n_heads"))
        if values.get("kv_lora_rank"):
            parts = (values.get("qk_nope_head_dim"), values.get("qk_rope_head_dim"))
            if all(isinstance(part, int) for part in parts):
                values["head_dim"] = sum(parts)
            values["n_kv_heads"] = n_heads
        elif isinstance(d_model, int) and isinstance(n_heads, int) and n_heads > 0:
            values.setdefault("n_kv_heads", n_heads)
            values.setdefault("head_dim", d_model // n_heads)
        if values.get("router", "deepseek") != "deepseek":
            values.setdefault("score_function", "softmax")
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        for broken, message in self._rules():
            if broken:
                raise ValueError(message)
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        """(is broken, what to change) for every rule that spans fields."""
        latent = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim)
        deepseek = self.family == "deepseek_v3"
        group_size = self.n_routed_experts // self.n_groups
        least = 2 if self.score_function == "sigmoid" else 1
        baseline = self.router != "deepseek"
        top_k = {"gshard": 2, "switch": 1, "hash": 1}.get(self.router, self.n_activated_experts)
        return [
            (
                not deepseek and (self.is_mla or self.is_moe or self.n_mtp > 0),
                f"family {self.family!r} is dense with grouped-query attention: unset kv_lora_rank, n_routed_experts "
                "and n_mtp, or set family='deepseek_v3'",
            ),
            (
                self.is_mla and None in latent,
                "kv_lora_rank asks for MLA: set qk_nope_head_dim, qk_rope_head_dim and v_head_dim too",
            ),
            (
                not self.is_mla and (latent != (None, None, None) or self.q_lora_rank is not None),
                "q_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim belong to MLA: set kv_lora_rank",
            ),
            (
                self.n_heads % self.n_kv_heads > 0,
                f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})",
            ),
            (self.rope_dim % 2 > 0, f"RoPE turns pairs: the rotary width ({self.rope_dim}) must be even"),
            (
                self.is_moe and not (0 < self.n_activated_experts <= self.n_routed_experts and self.moe_d_ff > 0),
                f"n_routed_experts={self.n_routed_experts} needs moe_d_ff > 0 and "
                f"1 <= n_activated_experts <= n_routed_experts (got {self.n_activated_experts})",
            ),
            (
                not self.is_moe and (self.n_activated_experts > 0 or self.n_shared_experts > 0),
                "n_activated_experts and n_shared_experts need n_routed_experts > 0",
            ),
            (
                self.is_moe and self.n_dense_layers > self.n_layers,
                f"n_dense_layers ({self.n_dense_layers}) exceeds n_layers ({self.n_layers})",
            ),
            (
                self.n_limited_groups > self.n_groups or (self.n_groups > 1 and self.n_routed_experts % self.n_groups),
                f"n_groups ({self.n_groups}) must divide n_routed_experts ({self.n_routed_experts}) and be at least "
                f"n_limited_groups ({self.n_limited_groups})",
            ),
            (
                self.n_groups > 1 and group_size < least,
                f"a group of experts needs at least {least} of them: lower n_groups ({self.n_groups})",
            ),
            (
                self.is_moe and self.n_limited_groups * group_size < self.n_activated_experts,
                f"{self.n_limited_groups} groups hold {self.n_limited_groups * group_size} experts, fewer than "
                f"n_activated_experts ({self.n_activated_experts}): raise n_limited_groups",
            ),
            (
                baseline and (self.n_activated_experts, self.n_groups, self.score_function) != (top_k, 1, "softmax"),
                f"router {self.router!r} needs n_routed_experts, n_activated_experts={top_k}, n_groups=1 and "
                "score_function='softmax'",
            ),
            (
                self.capacity_factor is not None and not (self.is_moe and (baseline or self.n_groups > 1)),
                "capacity_factor bounds the rows of a group of experts: set n_routed_experts and n_groups > 1, or a "
                "router whose capacity is an expert's (gshard, switch, hash)",
            ),
            (
                self.rope_factor > 1 and self.original_max_position is None,
                "rope_factor > 1 asks for YaRN: set original_max_position, the context before the extension",
            ),
            (
                self.mscale_all_dim == 0 and self.mscale != 1,
                "mscale_all_dim=0 leaves YaRN's whole factor to the cosines, unweighted: set mscale=1",
            ),
            (
                self.rope_factor > 1 and self.max_position > self.rope_factor * (self.original_max_position or 0),
                f"max_position ({self.max_position}) exceeds rope_factor x original_max_position",
            ),
        ]

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def is_moe(self) -> bool:
        return self.n_routed_experts > 0

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a query or key."""
        return (self.qk_rope_head_dim or 0) if self.is_mla else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return (self.v_head_dim or 0) if self.is_mla else self.head_dim

    @property
    def n_moe_layers(self) -> int:
        """Layers with routed experts, the MTP modules' blocks included."""
        return self.n_layers - self.n_dense_layers + self.n_mtp if self.is_moe else 0

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer` routes (MTP blocks are numbered on from `n_layers`)."""
        return self.is_moe and layer >= self.n_dense_layers

    def n_parameters(self) -> int:
        """Every trained number, MTP modules included; a shared embedding or head counts once."""
        return self._count(self.n_routed_experts) + self.n_mtp_parameters()

    def n_mtp_parameters(self) -> int:
        """What the MTP modules add to the main model, whose embedding and head they share."""
        projection_and_norms = 2 * self.d_model**2 + 3 * self.d_model
        block = self._block_norms() + self._block_matrices(self.n_layers, self.n_routed_experts)
        return self.n_mtp * (projection_and_norms + block)

    def n_active_parameters(self) -> int:
        """Parameters that one token's main-model forward pass reads: routed experts not chosen and MTP left out."""
        return self._count(self.n_activated_experts)

    def n_embedding_parameters(self) -> int:
        """Vocabulary tables, which scaling laws leave out: the embedding, and the head unless it is tied."""
        return (1 if self.tie_embeddings else 2) * self.vocab_size * self.d_model

    def flops_per_token(self, sequence_length: int, mtp: bool = False) -> int:
        """Training FLOPs (forward and backward) per token at that sequence length, MTP modules counted on request.

        6 per matrix weight the token meets (the head among them, the embedding look-up not) and 6·T·(qk + v widths)
        per head and layer for attention, as DeepSeek LLM (section 3.1) counts: no discount for the causal half.
        """
        attention = self.n_layers * self.n_heads * (self.head_dim + self.value_dim) * sequence_length
        main = 6 * (self._matrices(self.n_activated_experts) + attention)
        if not mtp:
            return main
        block = self._block_matrices(self.n_layers, self.n_activated_experts) + attention // self.n_layers
        return main + 6 * self.n_mtp * (block + 2 * self.d_model**2 + self.vocab_size * self.d_model)

    def non_embedding_flops_per_token(self, sequence_length: int) -> int:
        """M of DeepSeek LLM's scaling laws (section 3.2): `flops_per_token` without the head.

        For the shapes of its equation 2 (MHA, FFN of 8 d² weights) that is 72·n_layers·d² + 12·n_layers·d·T.
        """
        return self.flops_per_token(sequence_length) - 6 * self.vocab_size * self.d_model

    def cache_bytes_per_token(self, bytes_per_element: float = 2, float8: bool = False) -> float:
        """KV cache of one token: MLA keeps kv_lora_rank + rope numbers a layer, GQA keys and values of each kv head.

        `float8` counts MLA's quantised cache: a byte for each number of the latent, and its fp32 scale. V2's "93.3 %
        less than DeepSeek 67B" holds for V2 as deployed, its cache quantised to 6 bits an element (section 3.2.3),
        against the 67B in BF16: 60·576·0.75 of 95·2·8·128·2 bytes. In equal precision it is 82.2 % less.
        """
        if not self.is_mla:
            return self.n_layers * 2 * self.n_kv_heads * self.head_dim * bytes_per_element
        latent = (self.kv_lora_rank or 0) + 4 if float8 else (self.kv_lora_rank or 0) * bytes_per_element
        return self.n_layers * (latent + self.rope_dim * bytes_per_element)

    def _count(self, experts: int) -> int:
        biases = self.n_layers * (self.n_heads + 2 * self.n_kv_heads) * self.head_dim if self.family == "qwen2" else 0
        norms = self.n_layers * self._block_norms() + self.d_model
        table = 0 if self.tie_embeddings else self.vocab_size * self.d_model
        return self._matrices(experts) + norms + biases + table

    def _matrices(self, experts: int) -> int:
        blocks = sum(self._block_matrices(layer, experts) for layer in range(self.n_layers))
        return blocks + self.vocab_size * self.d_model

    def _block_norms(self) -> int:
        heads = 2 * self.head_dim if self.family == "qwen3" else 0
        return 2 * self.d_model + (self.kv_lora_rank or 0) + (self.q_lora_rank or 0) + heads

    def _block_matrices(self, layer: int, experts: int) -> int:
        d, heads = self.d_model, self.n_heads
        if self.is_mla:
            assert self.kv_lora_rank and self.qk_nope_head_dim
            query = heads * self.head_dim
            query_matrices = self.q_lora_rank * (d + query) if self.q_lora_rank else d * query
            latent = d * (self.kv_lora_rank + self.rope_dim)
            latent += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.value_dim)
            attention = query_matrices + latent + heads * self.value_dim * d
        else:
            attention = 2 * d * (heads + self.n_kv_heads) * self.head_dim
        if not self.has_experts(layer):
            return attention + 3 * d * self.d_ff
        router = d * self.n_routed_experts if self.router != "hash" else 0
        return attention + 3 * d * self.moe_d_ff * (experts + self.n_shared_experts) + router
