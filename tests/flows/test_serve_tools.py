"""Tools through OpenAI's API: a model that has learnt to call one is asked, answers the result, streams its calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from flows.server.app import Service, make_app
from flows.server.engine import Engine
from model.config import ModelConfig
from model.transformer import Transformer
from stages.tokens.bpe import train
from stages.tokens.chat_template import render

TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]
ASK = {"role": "user", "content": "2+3?"}
CALLED = {"role": "assistant", "content": "<think>so</think>I ask.", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": n}}} for n in (2, 3)
]}  # fmt: skip
TOLD = [{"role": "tool", "content": "5"}] * 2
DONE = {"role": "assistant", "content": "<think>so</think>5"}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """A server of a micro model that knows one conversation by heart."""
    tokenizer = train(
        ['name "add" arguments JSON "description" "parameters" To call: ## Tools'] * 3, 400, tool_marks=True
    )
    ids, mask = render([ASK, CALLED, *TOLD, DONE], tokenizer, tools=TOOLS)
    shape = {
        **{"family": "llama", "vocab_size": tokenizer.vocab_size, "d_model": 64, "n_layers": 2, "n_heads": 4},
        **{"n_kv_heads": 4, "head_dim": 16, "d_ff": 128, "max_position": 256},
    }
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens_BT, mask_BT = torch.tensor([ids]), torch.tensor([mask], dtype=torch.bool)
    for _ in range(90):
        loss = -model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:])[mask_BT[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    with TestClient(make_app(Service(Engine(model.eval()), tokenizer, ["m"]))) as found:
        yield found


def ask(client: TestClient, messages: list[dict[str, Any]], **options: Any) -> Any:
    body = {"model": "m", "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 80, **options}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response


def test_a_call_is_answered_and_the_result_is_read(client: TestClient) -> None:
    choice = ask(client, [ASK]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("I ask.", "so")
    said = [
        (call["type"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message["tool_calls"]
    ]
    assert said == [("function", "add", {"a": 2}), ("function", "add", {"a": 3})]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    # The model learnt to answer behind its thought, which a client gives back with the calls.
    again = {"role": "assistant", "content": CALLED["content"], "tool_calls": message["tool_calls"]}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in message["tool_calls"]]
    last = ask(client, [ASK, again, *results]).json()["choices"][0]
    assert (last["message"]["content"], last["finish_reason"]) == ("5", "stop")
    assert "tool_calls" not in last["message"]


def test_a_stream_holds_the_calls_back_and_gives_them_whole(client: TestClient) -> None:
    events = [line.removeprefix("data: ") for line in ask(client, [ASK], stream=True).text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "I ask."
    (calls,) = [choice["delta"]["tool_calls"] for choice in choices if "tool_calls" in choice["delta"]]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "add"), (1, "add")]
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_tools_that_are_not_offered_are_text(client: TestClient) -> None:
    offered = ask(client, [ASK]).json()["usage"]["prompt_tokens"]
    choice = ask(client, [ASK], tool_choice="none").json()
    assert choice["usage"]["prompt_tokens"] < offered
    assert "tool_calls" not in choice["choices"][0]["message"]


def test_a_call_that_is_cut_off_is_text_and_ends_for_its_length(client: TestClient) -> None:
    choice = ask(client, [ASK], max_tokens=20).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
