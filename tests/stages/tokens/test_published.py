"""Published tokenizers, whose marks and chat templates are not ours, as transformers reads the same files."""

import json
from functools import partial

import pytest
from transformers import AutoTokenizer

from infra.errors import InputError
from stages.rl.prompts import prompt_ids, reply_text
from stages.tokens.bpe import load_tokenizer
from stages.tokens.chat_template import render

R1 = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '<|im_start|>' + message.content }}
{%- else %}{{ '<|im_start|>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"""
TURNS = [
    {"role": "user", "content": "3 + 4 = ?"},
    {"role": "assistant", "content": "<think>3 + 4 = 7</think><answer>7</answer>"},
    {"role": "user", "content": "再加 1"},
    {"role": "assistant", "content": "<think>8</think><answer>8</answer>"},
]


@pytest.fixture
def publish(publish_tokenizer, tmp_path):
    """publish(**changes): a folder with a tokenizer in the manner of Qwen."""
    return partial(publish_tokenizer, tmp_path)


def test_ids_are_those_of_transformers_and_the_replies_are_what_is_learnt(publish):
    folder = publish()
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids, mask = render(TURNS, ours)
    assert ids == theirs.apply_chat_template(TURNS, return_dict=False)
    assert len(mask) == len(ids)
    runs = "".join(str(m) for m in mask).split("0")
    assert [len(run) for run in runs if run] == [len(ours.encode(t["content"])) + 1 for t in TURNS[1::2]]
    learnt = [number for number, m in zip(ids, mask, strict=True) if m]
    assert theirs.decode(learnt) == "".join(t["content"] + "<|im_end|>" for t in TURNS[1::2])
    prompt = prompt_ids(TURNS[0]["content"], "chat", ours)
    assert prompt == theirs.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt
    assert reply_text([*ours.encode("7"), ours.eos], ours) == "7"


def test_marks_are_those_of_the_files(publish):
    ours = load_tokenizer(publish())
    assert ours.bos is None
    assert prompt_ids("a", "r1_zero", ours) == ours.encode("a\n")
    assert ours.decode([ours.eos], skip_special=False) == "<|im_end|>"
    assert ours.decode([ours.pad], skip_special=False) == "<|endoftext|>"


def test_where_no_pad_is_named_it_is_eos(publish):
    ours = load_tokenizer(publish(pad_token=None, bos_token="<|endoftext|>"))
    assert ours.pad == ours.eos
    assert prompt_ids("a", "r1_zero", ours) == [ours.bos, *ours.encode("a\n")]


def test_a_message_cannot_forge_a_turn(publish):
    with pytest.raises(InputError, match=r"contains '<\|im_end\|>'"):
        render([{"role": "user", "content": "a<|im_end|>"}], load_tokenizer(publish()))


def test_a_template_that_forgets_the_chain_prompts_but_does_not_teach(publish):
    folder = publish(R1, bos_token="<|endoftext|>")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    prompt, _ = render(TURNS[:3], ours, generation_prompt=True)
    assert prompt == theirs.apply_chat_template(TURNS[:3], add_generation_prompt=True, return_dict=False)
    with pytest.raises(InputError, match="drops or rewrites what the assistant says"):
        render(TURNS[:2], ours)


def test_a_reply_that_ends_otherwise_than_generation_stops_is_refused(publish):
    with pytest.raises(InputError, match=r"does not end a reply with its eos_token '<\|endoftext\|>'"):
        render(TURNS, load_tokenizer(publish(eos_token="<|endoftext|>")))


def test_a_template_that_refuses_is_quoted(publish):
    ours = load_tokenizer(publish("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InputError, match="refuses the conversation: roles must alternate"):
        render(TURNS, ours, generation_prompt=True)


def test_a_tokenizer_without_a_template_says_so_when_one_is_needed(publish):
    ours = load_tokenizer(publish(template=None))
    assert prompt_ids("a", "r1_zero", ours)
    with pytest.raises(InputError, match="no chat template"):
        prompt_ids("a", "chat", ours)


def test_of_several_templates_the_default_is_taken(publish):
    folder = publish(template=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    chatml = load_tokenizer(publish()).template
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": chatml}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert load_tokenizer(folder).template == chatml


def test_what_is_missing_is_named(publish):
    with pytest.raises(InputError, match="names no eos_token"):
        load_tokenizer(publish(eos_token=None))
    folder = publish()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>"}))
    with pytest.raises(InputError, match=r"the vocabulary lacks \['<s>'\]"):
        load_tokenizer(folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(description | {"decoder": {"type": "Fuse"}}))
    with pytest.raises(InputError, match="only byte-level"):
        load_tokenizer(folder)
