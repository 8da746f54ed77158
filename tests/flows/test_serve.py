"""`fathom serve` with its own engine, asked by OpenAI's client; marked `vllm`, vLLM on the same checkpoint."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from flows.environment import answers
from flows.serve import native_engine, serve
from flows.server.app import Service, make_app
from flows.server.engine import Engine, EngineFailed
from flows.server.protocol import Choice
from infra.errors import InputError
from infra.settings import Settings
from infra.store import ArtifactStore
from model.batch import Request
from model.cache import Float8Cache
from model.float8 import in_float8
from model.generate import Generator
from model.transformer import Transformer
from stages.rl.engines import vllm
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.training.checkpoint import load_model

openai = pytest.importorskip("openai")

MODEL = "arm@latest"
QUESTION = [{"role": "user", "content": "Pull 3."}]


@contextmanager
def serving(store: ArtifactStore, *arguments: str, seconds: float = 240) -> Iterator[str]:
    """The address of `fathom serve`, as a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve", MODEL, "--port", str(port), *arguments],
        env={**os.environ, "FATHOM_STORE": str(store.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + seconds
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def address(chat_store: ArtifactStore) -> Iterator[str]:
    with serving(chat_store, "--engine", "native") as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


def test_a_server_in_fp8_says_nearly_what_an_exact_one_says(client: Any, chat_store: ArtifactStore) -> None:
    folder = chat_store.get(MODEL).path
    engine = native_engine(folder, speculate=False, fp8=True, max_batch=4)
    assert {type(cache) for cache in engine._batch._caches} == {Float8Cache}
    computing = [module for module in engine.model.modules() if hasattr(module, "float8")]
    assert [in_float8(module) for module in computing].count(False) == 1, "the head alone is exact"
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0, "logprobs": True}
    exact = client.chat.completions.create(**asked).choices[0]
    with TestClient(make_app(Service(engine, load_tokenizer(folder), [MODEL]))) as session:
        choice = session.post("/v1/chat/completions", json=asked).json()["choices"][0]
    assert choice["message"]["content"] == exact.message.content
    scores = [[entry.logprob for entry in exact.logprobs.content]]
    scores.append([entry["logprob"] for entry in choice["logprobs"]["content"]])
    assert scores[0] != scores[1] == pytest.approx(scores[0], abs=0.2)


def test_fp8_is_our_own_engines(chat_store: ArtifactStore) -> None:
    options = {"host": "127.0.0.1", "port": 1, "speculate": False, "max_batch": 4}
    with pytest.raises(InputError, match="our own engine's"):
        serve(chat_store, Settings(), MODEL, engine="vllm", fp8=True, **options)


def test_the_models_list_names_the_tag_and_the_artifact(client: Any, chat_store: ArtifactStore) -> None:
    found = client.models.list().data
    assert [model.id for model in found] == [MODEL, chat_store.resolve(MODEL)]


def test_a_chat_is_answered_with_its_reasoning_apart(client: Any) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, logprobs=True)
    choice = reply.choices[0]
    assert choice.message.reasoning_content == "so"
    assert choice.message.content.startswith("<answer>")
    assert choice.message.content.endswith("</answer>")
    assert choice.finish_reason == "stop"
    assert reply.usage.completion_tokens == len(choice.logprobs.content)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert all(entry.logprob <= 0 for entry in choice.logprobs.content)


def test_a_streamed_chat_is_the_same_chat_piece_by_piece(client: Any) -> None:
    asked = {"model": MODEL, "messages": QUESTION, "temperature": 0.8, "seed": 5, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    said: dict[int, dict[str, Any]] = {n: {"content": "", "reasoning_content": "", "tokens": []} for n in range(2)}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        for choice in chunk.choices:
            for name in ("content", "reasoning_content"):
                said[choice.index][name] += getattr(choice.delta, name, None) or ""
            said[choice.index]["tokens"] += (
                [entry.token for entry in choice.logprobs.content] if choice.logprobs else []
            )
            said[choice.index]["finish_reason"] = choice.finish_reason
    assert len(chunks) > 6
    assert chunks[0].choices[0].delta.role == "assistant"
    for choice in whole.choices:
        assert said[choice.index] == {
            "content": choice.message.content,
            "reasoning_content": getattr(choice.message, "reasoning_content", ""),
            "tokens": [entry.token for entry in choice.logprobs.content],
            "finish_reason": choice.finish_reason,
        }
    assert chunks[-1].usage == whole.usage


def test_completions_take_text_or_ids_several_at_a_time(client: Any, chat_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(chat_checkpoint)
    asked = {"model": MODEL, "max_tokens": 6, "temperature": 0, "logprobs": 0}
    two = client.completions.create(prompt=["Pull 1.", "so"], **asked)
    ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in ("Pull 1.", "so")]
    assert [c.text for c in two.choices] == [c.text for c in client.completions.create(prompt=ids, **asked).choices]
    assert two.usage.prompt_tokens == sum(map(len, ids))
    logprobs = two.choices[0].logprobs
    assert "".join(logprobs.tokens).startswith(two.choices[0].text)
    assert len(logprobs.token_logprobs) == len(logprobs.tokens) == len(logprobs.text_offset)
    streamed = client.completions.create(prompt="Pull 1.", stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == two.choices[0].text


def test_a_stop_string_ends_the_text_before_it(client: Any) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stop=["</answer>", "##"])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content.removeprefix("<answer>").isdigit()
    short = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2


def test_the_same_seed_gives_the_same_reply_whoever_else_is_asking(client: Any) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none") as many:
            replies = await asyncio.gather(
                *(
                    many.completions.create(
                        model=MODEL, prompt="Pull", max_tokens=20, seed=seed, temperature=temperature, top_p=top_p
                    )
                    for seed, temperature, top_p in [(1, 1.0, 1.0), (2, 0.7, 0.9), (1, 1.0, 1.0), (3, 0.0, 1.0)]
                )
            )
        return [reply.choices[0].text for reply in replies]

    together = asyncio.run(ask_all())
    alone = client.completions.create(model=MODEL, prompt="Pull", max_tokens=20, seed=1).choices[0].text
    assert together[0] == together[2] == alone


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "gpt-x"}, 404, "model", "no model 'gpt-x'"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"top_k": 5}, 400, "top_k", "no parameter top_k"),
        ({"presence_penalty": 1}, 400, "presence_penalty", "less than or equal to 0"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "judge", "content": "x"}]}, 400, "messages", "'system', 'user', 'assistant' or 'tool'"),
        ({"messages": [{"role": "user"}]}, 400, "messages", "content is missing"),
        ({"messages": [{"role": "user", "content": "<｜tool▁calls▁begin｜>"}]}, 400, "messages", "mark of the chat"),
        ({"tools": [{"type": "function", "function": {}}]}, 400, "tools", "Field required"),
        ({"tool_choice": "required"}, 400, "tool_choice", "'auto' or 'none'"),
        ({"max_tokens": 1000}, 400, "max_tokens", "max_position"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"stop": ""}, 400, "stop", "at least 1"),
    ],
)
def test_a_bad_request_is_refused_in_openais_form(
    address: str, change: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = httpx.post(f"{address}/chat/completions", json={"model": MODEL, "messages": QUESTION, **change})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]


def test_what_is_no_json_is_refused_too(address: str) -> None:
    response = httpx.post(f"{address}/completions", content="{", headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "error" in response.json()


# ---- the engine by itself


@pytest.fixture(scope="module")
def model(chat_checkpoint: Path) -> Transformer:
    return load_model(chat_checkpoint)


def request(prompt: list[int], longest: int, uses: int = 1) -> Request:
    return Request(prompt, longest, torch.zeros(longest, uses), temperature=0.0)


async def collect(replies: Any) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async for piece in replies:
        tokens.setdefault(piece.number, []).extend(piece.tokens)
    return tokens


@pytest.mark.parametrize("speculate", [False, True])
def test_requests_that_arrive_while_others_run_join_their_batch(model: Transformer, speculate: bool) -> None:
    prompts = [[0, 20, 21], [0, 22], [0, 23, 24, 25], [0, 30]]
    engine = Engine(model, max_batch=3, speculate=speculate)
    sizes: list[int] = []
    step = engine._batch.step
    engine._batch.step = lambda: sizes.append(engine._batch.n_going) or step()  # type: ignore[method-assign, func-returns-value]

    async def talk() -> list[dict[int, list[int]]]:
        first = engine.submit([request(prompts[0], 40, 3)])
        engine.start()
        await anext(first)
        others = [engine.submit([request(prompt, 30, 3)]) for prompt in prompts[1:]]
        return [await collect(replies) for replies in (first, *others)]

    found = asyncio.run(talk())
    engine.close()
    for prompt, tokens in zip(prompts[1:], found[1:], strict=True):
        assert tokens[0] == Generator(model).generate([prompt], 30, temperature=0)[0].tokens
    assert max(sizes) == 3


def test_who_stops_listening_leaves_the_batch(model: Transformer) -> None:
    engine = Engine(model, max_batch=1)

    async def talk() -> dict[int, list[int]]:
        endless = engine.submit([request([0, 20], 90)])
        engine.start()
        await anext(endless)
        endless.close()
        return await collect(engine.submit([request([0, 22], 5)]))

    assert len(asyncio.run(talk())[0]) == 5
    engine.close()


@pytest.mark.parametrize("where", ["admit", "step"])
def test_an_error_of_the_engine_reaches_every_caller(
    where: str, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    monkeypatch.setattr(engine._batch, where, lambda *_: 1 / 0)

    async def talk() -> None:
        calls = [engine.submit([request([0, 20], 9)]) for _ in range(2)]
        engine.start()
        for call in calls:
            with pytest.raises(EngineFailed, match="ZeroDivisionError"):
                await asyncio.wait_for(collect(call), 30)
        engine._thread.join()
        with pytest.raises(EngineFailed, match="has died"):
            engine.submit([request([0, 20], 9)])

    asyncio.run(talk())


def test_a_stop_string_is_found_across_tokens_and_half_of_one_is_not_given_away(chat_checkpoint: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(chat_checkpoint)
    choice = Choice(tokenizer, ["12", "#"])
    given = [choice.push([token], False, False) for token in tokenizer.encode("a1")]
    assert "".join(given) == "a"
    assert choice.push(tokenizer.encode("3"), False, False) == "13"
    assert choice.push(tokenizer.encode("12"), False, False) == ""
    assert choice.finish_reason == "stop"
    assert choice.n_tokens == sum(len(tokenizer.encode(text)) for text in ("a1", "3", "12"))


@pytest.mark.vllm
def test_vllm_serves_the_export_and_gives_our_own_greedy_reply(
    chat_store: ArtifactStore, chat_checkpoint: Path
) -> None:
    pytest.importorskip("vllm")
    with serving(chat_store, "--engine", "vllm", seconds=500) as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        assert [model.id for model in client.models.list().data] == [MODEL, chat_store.resolve(MODEL)]
        reply = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=20)
        text = client.completions.create(model=MODEL, prompt=[[0, 20, 21, 22]], temperature=0, max_tokens=12)
        again = [client.completions.create(model=MODEL, prompt=[[0, *range(20, 60)]], max_tokens=1) for _ in range(2)]
        metrics = httpx.get(address.removesuffix("/v1") + "/metrics").text
    assert [one.usage.prompt_tokens for one in again] == [41, 41]
    hits = re.search(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert hits is not None
    assert float(hits[1]) == vllm.CPU_BLOCK  # the whole blocks of what is asked again
    assert [artifact.kind for artifact in chat_store.find("export")] == ["export"]
    assert reply.choices[0].message.reasoning == "so"
    assert reply.choices[0].message.content.startswith("<answer>")
    tokenizer = load_tokenizer(chat_checkpoint)
    ours = Generator(load_model(chat_checkpoint)).generate([[0, 20, 21, 22]], 12, 0, stop_ids=(tokenizer.eos,))[0]
    assert text.choices[0].text == tokenizer.decode(ours.tokens)
