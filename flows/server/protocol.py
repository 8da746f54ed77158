"""OpenAI's requests as far as we serve them, their errors, and a reply's text on its way to a response.

A parameter that would change the answer and is not implemented is refused, never ignored. Reasoning is given apart, as
DeepSeek's API and vLLM do for R1: `reasoning_content`, and under `reasoning`, which vLLM has renamed it to.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from stages.tokens.bpe import Tokenizer
from stages.tokens.text_stream import BROKEN, TextStream, hold_back
from stages.tokens.tools import read_tool_calls

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions; a chat may fill the context


class ApiError(Exception):
    """What a client did wrong: an HTTP status and OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Request):
    include_usage: bool = False


class _Sampling(_Request):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: list[Annotated[str, StringConstraints(min_length=1)]] = Field([], max_length=4)
    max_tokens: int | None = Field(None, ge=1)
    # Neutral values only: clients like to send them.
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    user: str | None = None  # changes nothing

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop or []


class CompletionRequest(_Sampling):
    """/v1/completions. `logprobs` 0 gives the sampled tokens' own; alternatives are not kept."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=0)
    echo: Literal[False] = False
    best_of: Literal[1] | None = None


class TextPart(_Request):
    type: Literal["text"]
    text: str


class CalledFunction(_Request):
    name: str
    arguments: str


class ToolCall(_Request):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Request):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant has tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing: only a message with tool_calls may have none")
        return self

    def record(self) -> dict[str, Any]:
        """The message as a chat template reads it; InputError for arguments that are no JSON object."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        said: dict[str, Any] = {"role": self.role, "content": text}
        if self.tool_calls:
            said["tool_calls"] = read_tool_calls([call.model_dump() for call in self.tool_calls], "messages")
        return said | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


class OfferedFunction(_Request):
    name: str = Field(min_length=1)
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: Literal[False] | None = None


class Tool(_Request):
    type: Literal["function"]
    function: OfferedFunction

    def record(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"})}


class ChatRequest(_Sampling):
    """/v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=0)
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none"] = "auto"  # "none": the tools are not offered
    parallel_tool_calls: Literal[True] = True

    @property
    def offered(self) -> list[dict[str, Any]]:
        return [tool.record() for tool in self.tools] if self.tool_choice == "auto" else []


class Choice:
    """The text of one reply as its tokens come: whole characters, cut where the first stop string begins."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.finish_reason: Literal["stop", "length", "tool_calls"] | None = None
        self.n_tokens = 0
        self._text, self._stops, self._eos, self._held = TextStream(tokenizer), stops, tokenizer.eos, ""

    def push(self, tokens: Sequence[int], done: bool, finished: bool) -> str:
        """The text that is certain now; `finish_reason` is set when it is the last."""
        self.n_tokens += len(tokens)
        text = self._held + self._text.push([token for token in tokens if token != self._eos])
        if done:
            text += self._text.close()
        first = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=None)
        if first is not None:
            self.finish_reason = "stop"
            return text[:first]
        if done:
            self.finish_reason = "stop" if finished else "length"
            return text
        text, self._held = hold_back(text, self._stops)
        return text


def token_logprobs(tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[float]) -> list[dict[str, Any]]:
    """What a chat response says of each sampled token; the log-probability is that at the request's temperature."""
    entries = []
    for token, logprob in zip(tokens, logprobs, strict=True):
        text = tokenizer.token(token)
        content = None if BROKEN in text else list(text.encode())
        entries.append({"token": text, "logprob": logprob, "bytes": content, "top_logprobs": []})
    return entries


def told_calls(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of tools as a response has them; a streamed one has them whole, in its last piece."""
    return [
        {
            "index": number,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for number, call in enumerate(calls)
    ]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
