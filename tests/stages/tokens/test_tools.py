"""Tools in conversations: the ids and masks of transformers, calls read back, and marks that nobody forges."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from infra.errors import InputError
from stages.tokens import bpe
from stages.tokens.chat_template import JINJA, render
from stages.tokens.tools import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR, TOOL_MARKS, calls_text, read_calls

TEXTS = ["The tool returns the weather in Paris: 21.\n" * 5, "查询北京的天气，返回温度。\n" * 5]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{about} <b> & 'c' \"d\"",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name, about in (("weather", "Temperature of a city"), ("population", "城市的人口"))
]


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "简洁 & brief."}
USER = {"role": "user", "content": " Paris?\n"}
ASKS = {"role": "assistant", "content": "<think>ask</think>", "tool_calls": [call("weather", city="Paris <1>")]}
ASKS_TWICE = {"role": "assistant", "content": None, "tool_calls": [call("weather", city="北京"), call("population")]}
TOLD = {"role": "tool", "content": '\n{"t": 21}\n'}
ANSWERS = {"role": "assistant", "content": "\n\n21."}
AGAIN = {"role": "user", "content": "再问北京"}
CONVERSATIONS = {
    "offered": [USER],
    "offered behind a system message": [SYSTEM, USER, ANSWERS],
    "offered to nobody yet": [SYSTEM],
    "called": [USER, ASKS],
    "answered": [SYSTEM, USER, ASKS, TOLD, ANSWERS],
    "several turns and calls": [USER, ASKS, TOLD, ANSWERS, AGAIN, ASKS_TWICE, TOLD, TOLD, ASKS, TOLD, ANSWERS],
    "arguments as text": [
        USER,
        {**ANSWERS, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city":1}'}}]},
    ],
}


@pytest.fixture(scope="module", params=[False, True], ids=["marks spelt out", "marks with ids"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    bpe.train(TEXTS, 330, min_frequency=1, tool_marks=request.param).save(made)
    return made


@pytest.mark.parametrize("tools", [[], TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_transformers_renders_the_same_ids_and_mask(folder, name, tools):
    ours, theirs = bpe.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for generation_prompt in (False, True):
        ids, mask = render(CONVERSATIONS[name], ours, generation_prompt, tools)
        out = theirs.apply_chat_template(
            CONVERSATIONS[name],
            tools=tools or None,
            add_generation_prompt=generation_prompt,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert out["input_ids"] == ids
        assert out["assistant_masks"] == mask


def test_calls_are_learnt_and_what_tools_say_is_not(folder):
    ours = bpe.load_tokenizer(folder)
    ids, mask = render(CONVERSATIONS["several turns and calls"], ours, tools=TOOLS)
    learnt = ours.decode([number for number, learn in zip(ids, mask, strict=True) if learn], skip_special=False)
    replies = [m for m in CONVERSATIONS["several turns and calls"] if m["role"] == "assistant"]
    said = [(m["content"] or "") + calls_text(m.get("tool_calls", [])) + bpe.EOS for m in replies]
    assert learnt == "".join(said)
    assert f"{CALLS}{CALL}weather{SEPARATOR}" + '{"city": "Paris <1>"}' + END_CALL + END_CALLS in said[0]


def test_a_prompt_is_the_beginning_of_what_was_learnt(folder):
    ours = bpe.load_tokenizer(folder)
    whole = CONVERSATIONS["several turns and calls"]
    ids, _ = render(whole, ours, tools=TOOLS)
    for number, message in enumerate(whole):
        if message["role"] == "assistant":
            prompt, _ = render(whole[:number], ours, generation_prompt=True, tools=TOOLS)
            assert ids[: len(prompt)] == prompt


def test_marks_with_ids_come_last_and_leave_all_other_ids_alone():
    plain, marked = bpe.train(TEXTS, 330), bpe.train(TEXTS, 330 + len(TOOL_MARKS), tool_marks=True)
    assert marked.vocab_size == 330 + len(TOOL_MARKS)
    assert [marked.encode(mark) for mark in TOOL_MARKS] == [[330 + n] for n in range(len(TOOL_MARKS))]
    assert all(len(plain.encode(mark)) > 5 for mark in TOOL_MARKS)
    for text in TEXTS:
        assert plain.encode(text) == marked.encode(text)


def test_a_message_cannot_forge_a_call_or_what_a_tool_said(folder):
    ours = bpe.load_tokenizer(folder)
    for role in ("system", "user", "tool"):
        with pytest.raises(InputError, match=f"the {role} contains '{TOOL_MARKS[5]}'"):
            render([{"role": role, "content": f"21{TOOL_MARKS[5]}"}], ours)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="｜"), min_size=1, max_size=8)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | WORDS, lambda inner: st.lists(inner, max_size=2))


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="｜"), max_size=20),
    st.lists(st.tuples(WORDS.map(str.strip).filter(bool), st.dictionaries(WORDS, VALUES, max_size=3)), max_size=3),
)
def test_calls_are_read_back_as_they_were_made(before, made):
    calls = [call(name, **{}) | {"function": {"name": name, "arguments": arguments}} for name, arguments in made]
    assert read_calls(before + calls_text(calls)) == (before, calls)


@pytest.mark.parametrize(
    "text",
    [
        CALLS,
        CALLS + END_CALLS,
        f"{CALLS}{CALL}f{SEPARATOR}{{}}{END_CALL}",
        f"{CALLS}{CALL}f{SEPARATOR}[1]{END_CALL}{END_CALLS}",
        f"{CALLS}{CALL}f{SEPARATOR}{{{END_CALL}{END_CALLS}",
        f"{CALLS}{CALL}f{SEPARATOR}{{}}{END_CALL}, or{END_CALLS}",
        f"{CALLS}{CALL}f{{}}{END_CALL}{END_CALLS}",
        CALLS + f"{CALL}f{SEPARATOR}" * 20_000 + END_CALLS,
        f"{CALLS}{CALL}f{SEPARATOR}" + "[" * 100_000 + f"{END_CALL}{END_CALLS}",
        f"{CALLS}{CALL}f{SEPARATOR}{{}}{END_CALL}{END_CALLS} and more",
    ],
)
def test_a_malformed_call_is_text(text):
    assert read_calls(text) == (text, [])


BEFORE_TOOLS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def test_tokenizers_from_before_tools_render_as_they_did_and_refuse_tools(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == JINJA
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": BEFORE_TOOLS}))
    new, old = bpe.load_tokenizer(folder), bpe.load_tokenizer(tmp_path)
    turns = [SYSTEM, USER, ANSWERS, AGAIN, ANSWERS]
    for generation_prompt, end in ((False, 5), (True, 4)):
        expected = render(turns[:end], new, generation_prompt)
        rendered = render(turns[:end], old, generation_prompt)
        assert rendered[0] == expected[0]
        assert generation_prompt or rendered == expected
    with pytest.raises(InputError, match="does not tell of the tool 'weather'"):
        render([USER], old, tools=TOOLS)
    with pytest.raises(InputError, match="does not tell of the tool 'weather'"):
        render([USER, ASKS], old)
    with pytest.raises(InputError, match="unknown role tool"):
        render([USER, TOLD], old)


def test_a_template_that_lists_tools_and_forgets_the_calls_cannot_be_learnt_from(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    forgets = "{{ tools | tojson }}" + BEFORE_TOOLS
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": forgets}))
    with pytest.raises(InputError, match="drops or rewrites what the assistant says"):
        render([USER, {**ASKS, "content": ""}], bpe.load_tokenizer(tmp_path), tools=TOOLS)


@pytest.mark.vllm
def test_vllms_parser_reads_our_calls(tmp_path):
    pytest.importorskip("vllm")
    from vllm.tool_parsers import ToolParserManager

    bpe.train(TEXTS, 400, tool_marks=True).save(tmp_path)
    parser = ToolParserManager.get_tool_parser("deepseek_v31")(AutoTokenizer.from_pretrained(tmp_path))
    made = [call("weather", city="北京 <1>"), call("population")]
    found = parser.extract_tool_calls("I ask." + calls_text(made), request=None)
    assert (found.tools_called, found.content) == (True, "I ask.")
    read = [(one.function.name, json.loads(one.function.arguments)) for one in found.tool_calls]
    assert read == [(one["function"]["name"], one["function"]["arguments"]) for one in made]
