"""A bandit in the shape of the real thing: problems, and a micro model that knows the reply format and nothing else."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.problems.problem import Problem

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
def bandit_base(tmp_path_factory, bandit_problems, taught):
    """A checkpoint with MoE, MLA and MTP that answers any question with any digit alike."""
    pairs = [(problem.question, arm) for problem in bandit_problems for arm in ARMS]
    return taught(tmp_path_factory.mktemp("bandit"), pairs, steps=60)


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
