"""The HTTP application: /v1/models, /v1/completions and /v1/chat/completions, whole or as server-sent events."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from flows.server.engine import Engine, EngineFailed
from flows.server.protocol import (
    COMPLETION_TOKENS,
    ApiError,
    ChatRequest,
    Choice,
    CompletionRequest,
    token_logprobs,
    told_calls,
    usage,
)
from infra.errors import InputError
from model import batch
from model.generate import Piece, check_request
from model.sampling import N_USES
from stages.tokens.bpe import Tokenizer
from stages.tokens.chat_template import JINJA, render
from stages.tokens.text_stream import CallStream, ThinkingStream

Body = CompletionRequest | ChatRequest


class Call:
    """One HTTP request on its way through the engine, and the parts of its response."""

    def __init__(self, service: Service, body: Body, prompts: list[list[int]]) -> None:
        self.service, self.body, self.prompts = service, body, prompts
        self.chat = isinstance(body, ChatRequest)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self.choices = [Choice(service.tokenizer, body.stop) for _ in range(len(prompts) * body.n)]
        self.thinking = [ThinkingStream() for _ in self.choices]
        offered = isinstance(body, ChatRequest) and body.offered
        self.calling = [CallStream() for _ in self.choices] if offered else None
        self.offsets = [0] * len(self.choices)
        self.replies = service.engine.submit(service.requests(body, prompts))

    async def parts(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """(choice, what is new of it: text, reasoning, logprobs, finish_reason) until all are finished."""
        try:
            async for piece in self.replies:
                choice = self.choices[piece.number]
                text = choice.push(piece.tokens, piece.done, piece.finished)
                if choice.finish_reason:
                    self.replies.cancel(piece.number)
                yield piece.number, self._part(piece, text)
        finally:
            self.replies.close()

    def _part(self, piece: Piece, text: str) -> dict[str, Any]:
        reason = self.choices[piece.number].finish_reason
        part: dict[str, Any] = {"finish_reason": reason}
        if isinstance(self.body, ChatRequest):
            stream = self.thinking[piece.number]
            said = stream.push(text) + (stream.close() if reason else [])
            for name, thinking in (("content", False), ("reasoning_content", True)):
                part[name] = "".join(stretch.text for stretch in said if stretch.thinking == thinking)
            part["tool_calls"] = None
            if self.calling is not None:
                part |= self._called(self.calling[piece.number], part["content"], reason)
            entries = token_logprobs(self.service.tokenizer, piece.tokens, piece.logprobs)
            part["logprobs"] = {"content": entries} if self.body.logprobs else None
        else:
            part["text"] = text
            part["logprobs"] = self._logprobs(piece) if self.body.logprobs is not None else None
        return part

    def _called(self, stream: CallStream, content: str, reason: str | None) -> dict[str, Any]:
        """The part's content without what may be calls, and at the end the calls, for which the model then stopped."""
        content = stream.push(content)
        if reason is None:
            return {"content": content}
        rest, calls = stream.close()
        stopped = "tool_calls" if calls and reason == "stop" else reason
        return {"content": content + rest, "tool_calls": told_calls(calls) or None, "finish_reason": stopped}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        texts = [self.service.tokenizer.token(token) for token in piece.tokens]
        offsets = []
        for text in texts:
            offsets.append(self.offsets[piece.number])
            self.offsets[piece.number] += len(text)
        return {"tokens": texts, "token_logprobs": piece.logprobs, "top_logprobs": None, "text_offset": offsets}

    def usage(self) -> dict[str, int]:
        return usage(sum(map(len, self.prompts)), sum(choice.n_tokens for choice in self.choices))

    async def whole(self) -> dict[str, Any]:
        """The response to a request without `stream`."""
        found: list[list[dict[str, Any]]] = [[] for _ in self.choices]
        async for number, part in self.parts():
            found[number].append(part)
        return {
            **self.head,
            "choices": [self._choice(number, _joined(parts), "message") for number, parts in enumerate(found)],
            "usage": self.usage(),
        }

    async def events(self) -> AsyncIterator[str]:
        """The response as server-sent events."""
        head = {**self.head, "object": f"{self.head['object']}.chunk"} if self.chat else self.head
        options = self.body.stream_options
        wants_usage = options is not None and options.include_usage
        blank = {"usage": None} if wants_usage else {}
        try:
            if self.chat:
                for number in range(len(self.choices)):
                    first = {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield _event({**head, "choices": [first], **blank})
            async for number, part in self.parts():
                if any(part.values()):  # half a character says nothing yet
                    yield _event({**head, "choices": [self._choice(number, part, "delta")], **blank})
            if wants_usage:
                yield _event({**head, "choices": [], "usage": self.usage()})
        except EngineFailed as error:
            yield _event(ApiError(str(error), status=500).body)
        yield "data: [DONE]\n\n"

    def _choice(self, number: int, part: dict[str, Any], holder: str) -> dict[str, Any]:
        rest = {"logprobs": part["logprobs"], "finish_reason": part["finish_reason"]}
        if not self.chat:
            return {"index": number, "text": part["text"], **rest}
        said = {"role": "assistant", "content": part["content"]} if holder == "message" else {}
        if holder == "delta" and part["content"]:
            said["content"] = part["content"]
        if part["tool_calls"]:
            calls = part["tool_calls"]
            said["tool_calls"] = calls if holder == "delta" else [{k: c[k] for k in c if k != "index"} for c in calls]
            said |= {"content": part["content"] or None} if holder == "message" else {}
        if part["reasoning_content"]:
            said |= {"reasoning_content": part["reasoning_content"], "reasoning": part["reasoning_content"]}
        return {"index": number, holder: said, **rest}


class Service:
    """What a server answers from: the engine, the tokenizer, and the names that the model goes by."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        self.engine, self.tokenizer, self.names = engine, tokenizer, list(names)

    def requests(self, body: Body, prompts: list[list[int]]) -> list[batch.Request]:
        """The engine's requests: `n` for each prompt, with random numbers from the seed."""
        config = self.engine.model.config
        if isinstance(body, ChatRequest):
            longest = body.max_completion_tokens or body.max_tokens or max(1, config.max_position - len(prompts[0]))
        else:
            longest = body.max_tokens or COMPLETION_TOKENS
        for prompt in prompts:
            if any(not 0 <= token < config.vocab_size for token in prompt):
                raise ApiError(f"a token id of the prompt is not below {config.vocab_size}", "prompt")
            try:
                check_request(config, len(prompt), longest)
            except InputError as error:
                raise ApiError(str(error), "max_tokens", code="context_length_exceeded") from None
        seeded = torch.Generator()
        seeded.seed() if body.seed is None else seeded.manual_seed(body.seed)
        uses = N_USES if self.engine.speculate else 1
        draws = torch.rand(len(prompts) * body.n, longest, uses, generator=seeded)
        each = [prompt for prompt in prompts for _ in range(body.n)]
        device = self.engine.model.embedding.weight.device
        stop_ids = frozenset({self.tokenizer.eos})
        return [
            batch.Request(prompt, longest, draws_TU.to(device), body.temperature, body.top_p, stop_ids)
            for prompt, draws_TU in zip(each, draws, strict=True)
        ]

    async def answer(self, body: Body, prompts: Callable[[], list[list[int]]]) -> Response:
        if body.model not in self.names:
            names = ", ".join(self.names)
            raise ApiError(f"no model {body.model!r}; this server has {names}", "model", 404, "model_not_found")
        call = Call(self, body, prompts())
        if body.stream:
            return StreamingResponse(call.events(), media_type="text/event-stream")
        return JSONResponse(await call.whole())

    def completion_prompts(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        """Ids of each prompt; text begins a document, ids are taken as they are."""
        if isinstance(prompt, str):
            prompt = [prompt]
        if not prompt:
            raise ApiError("the prompt is empty", "prompt")
        if isinstance(prompt[0], int):
            return [list(prompt)]  # type: ignore[arg-type]
        return [
            [*self.tokenizer.opening, *self.tokenizer.encode(one)] if isinstance(one, str) else list(one)  # type: ignore[call-overload]
            for one in prompt
        ]

    def chat_prompt(self, body: ChatRequest) -> list[list[int]]:
        if body.offered and self.tokenizer.template != JINJA:
            raise ApiError("calls of tools are read in our own chat format, and this checkpoint has another", "tools")
        try:
            messages = [message.record() for message in body.messages]
            return [render(messages, self.tokenizer, generation_prompt=True, tools=body.offered)[0]]
        except InputError as error:
            raise ApiError(str(error), "messages") from None


def make_app(service: Service) -> FastAPI:
    """The application; the engine runs from its start-up to its end."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.close()

    app = FastAPI(title="Fathom", lifespan=lifespan)
    created = int(time.time())

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        name = place[0] if place else None
        known = first["type"] != "extra_forbidden"
        message = f"{'.'.join(place)}: {first['msg']}" if known else f"this server has no parameter {'.'.join(place)}"
        refusal = ApiError(message, name)
        return JSONResponse(refusal.body, refusal.status)

    @app.exception_handler(EngineFailed)
    async def failed(_: Request, error: EngineFailed) -> JSONResponse:
        return JSONResponse(ApiError(str(error), status=500).body, 500)

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        longest = service.engine.model.config.max_position
        facts = {"object": "model", "created": created, "owned_by": "fathom", "max_model_len": longest}
        return {"object": "list", "data": [{"id": name, **facts} for name in service.names]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        return await service.answer(body, lambda: service.completion_prompts(body.prompt))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        return await service.answer(body, lambda: service.chat_prompt(body))

    return app


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Parts of one choice as one: texts and lists put together, the last reason."""
    whole = parts[0]
    for part in parts[1:]:
        for name, value in part.items():
            if isinstance(value, dict):
                whole[name] = {key: whole[name][key] + more if more else more for key, more in value.items()}
            else:
                whole[name] = whole[name] + value if isinstance(value, str) and name != "finish_reason" else value
    return whole


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
