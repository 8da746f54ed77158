"""A bandit in the shape of the real thing: problems, and a micro model that knows the reply format and nothing else."""

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model.config import ModelConfig
from model.transformer import Transformer
from stages.problems.problem import Problem
from stages.tokens.bpe import train
from stages.tokens.chat_template import render
from stages.training.checkpoint import save_model

ARMS = "0123456789"
CHATML = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


@pytest.fixture(scope="session")
def bandit_problems():
    """Whatever is asked, arm 3 pays."""
    return tuple(
        Problem(f"arm-{digit}", "bandit", "en", 1, f"Pull {digit}.", "so", "3", "digits", {"value": "3"}, digit)
        for digit in ARMS
    )


@pytest.fixture(scope="session")
def bandit_base(tmp_path_factory, bandit_problems):
    """A checkpoint with MoE, MLA and MTP that answers any question with any digit alike."""
    folder = tmp_path_factory.mktemp("bandit")
    tokenizer = train(["so Pull 0123456789." * 3], 280, digits="single", min_frequency=1)
    tokenizer.save(folder)
    torch.manual_seed(0)
    config = ModelConfig(
        **{"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64},
        **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "init_std": 0.05},
        **{"n_dense_layers": 1, "n_routed_experts": 4, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 16},
        **{"max_position": 64, "n_mtp": 1},
    )
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens_BT = torch.tensor(
        [
            render(
                [
                    {"role": "user", "content": problem.question},
                    {"role": "assistant", "content": f"<think>so</think><answer>{arm}</answer>"},
                ],
                tokenizer,
            )[0]
            for problem in bandit_problems
            for arm in ARMS
        ]
    )
    for _ in range(60):
        loss = -model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(folder, model, None)
    return folder


@pytest.fixture(scope="session")
def publish_tokenizer():
    """publish_tokenizer(folder, template, **settings): write a tokenizer in the manner of Qwen's; the folder."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["the answer is 3 + 4 = 7, 再加 1"] * 3, trainer)

    def publish(folder, template=CHATML, **settings):
        chosen = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **settings}
        made = PreTrainedTokenizerFast(tokenizer_object=backend, **chosen)
        made.chat_template = template
        made.save_pretrained(folder)
        return folder

    return publish
