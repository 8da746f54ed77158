"""vLLM inside the learner's own process, on CPU or CUDA, fed with new weights after every update.

Written for vLLM 0.32. What its CPU build needs (found by comparing with transformers: without any of these it
crashes or is silently wrong):
- float32, which is nearer than bfloat16 to a learner of either precision (`benchmarks/rl/mismatch.py`);
- `VLLM_MLA_DISABLE=1` unless kv_lora_rank = 512 and the rope part = 64, the one shape its MLA kernel was compiled for;
- custom rotary embedding off: that kernel takes the 3-dimensional rope part of an MLA query for one head;
- plain torch linears (no oneDNN), because prepacked weights are freed and cannot be loaded again;
- experts packed anew by hand after each load.
vLLM keeps memory and the process group that it was started with: a job of another number of ranks cannot be given its
process ("world group already initialized with a different world size"). Stages that offer it end their ranks' processes
with the job (`spmd` without `keep`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from model.config import ModelConfig
from model.exchange import export_hf, published_tensors
from model.transformer import Transformer
from stages.rl.engines.base import Reply, Sampling

CPU_CACHE_GIB = 1  # else vLLM takes a large share of the memory
GPU_MEMORY_SHARE = 0.4  # the learner lives on the same device
CPU_BLOCK = 32  # tokens: the smallest that its attention takes, for a prefix is shared in whole blocks (default: 128)
MLA_KERNEL_SHAPE = (512, 64)
COMPILATION = {"custom_ops": ["-rotary_embedding"]}


class VllmEngine:
    """Generates with `model`'s weights as of the last `update_weights` (at first: as of the construction).

    It computes in `dtype`, a name of vLLM's; None: float32 on a CPU, bfloat16 on CUDA.
    """

    def __init__(self, model: Transformer, tokenizer_dir: str, dtype: str | None = None) -> None:
        self._model = model
        self._cpu = not torch.cuda.is_available()
        os.environ.update(environment(model.config, self._cpu))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its weights are reached
        if self._cpu:
            _keep_plain_linears()
        from vllm import LLM

        with tempfile.TemporaryDirectory() as folder:
            export_hf(model, folder, tokenizer_dir)
            self._llm = LLM(
                model=folder,
                dtype=dtype or ("float32" if self._cpu else "bfloat16"),
                max_model_len=model.config.max_position,
                enforce_eager=self._cpu,
                enable_prefix_caching=True,  # which vLLM itself turns off for its CPU MLA kernel
                block_size=CPU_BLOCK if self._cpu else None,
                logprobs_mode="processed_logprobs",  # after the temperature, as the learner computes them
                compilation_config=COMPILATION,
                gpu_memory_utilization=GPU_MEMORY_SHARE,
                disable_log_stats=True,
            )
        worker = self._llm.llm_engine.model_executor.driver_worker
        self._served = getattr(worker, "worker", worker).model_runner.model

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Reply]:
        """As the protocol; with top_p < 1, vLLM's log-probabilities are those *after* the truncation.

        Replies to equal prompts share their whole blocks, within a call: so they depend on nothing that was asked
        before, nor on earlier weights.
        """
        from vllm import SamplingParams

        emptied = self._llm.reset_prefix_cache()
        assert emptied, "replies of an earlier call are unfinished"
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(sampling.stop_ids),
                ignore_eos=True,  # the stop ids alone decide
                seed=(seed + number) % 2**63,
                logprobs=0,
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        return [_reply(output.outputs[0]) for output in outputs]

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = self._model.state_dict()
        for name, tensor in named_tensors:
            if own[name].data_ptr() != tensor.data_ptr():
                own[name].copy_(tensor)
        self._served.load_weights(published_tensors(self._model))
        if self._cpu:
            _pack_experts(self._served)


def _reply(output: Any) -> Reply:
    tokens = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True)]
    return Reply(tokens, logprobs, output.finish_reason == "stop")


def environment(config: ModelConfig, cpu: bool) -> dict[str, str]:
    """What vLLM reads when it is imported or builds an engine for a model of this config."""
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    if cpu:
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(CPU_CACHE_GIB)
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # every rank has an engine: none may claim all cores
        if config.is_mla and (config.kv_lora_rank, config.qk_rope_head_dim) != MLA_KERNEL_SHAPE:
            variables["VLLM_MLA_DISABLE"] = "1"
    return variables


def _keep_plain_linears() -> None:
    import vllm.model_executor.layers.utils as layers
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False
    layers.check_cpu_sgl_kernel = lambda *_, **__: False


def _pack_experts(served: torch.nn.Module) -> None:
    """Repack experts in the layout that the CPU kernel reads: `load_weights` writes the plain one."""
    from vllm import _custom_ops

    for name, module in served.named_modules():
        if name.endswith("routed_experts"):
            for weight in (module.w13_weight, module.w2_weight):
                weight.data.copy_(_custom_ops.cpu_prepack_moe_weight(weight.data.clone(), "vec"))
