"""Conversations put to a checkpoint, one reply each, as one SPMD program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch

from infra.metrics import Report
from stages.problems.problem import Language
from stages.rl.engines import open_engine
from stages.rl.engines.base import Reply, Sampling
from stages.rl.prompts import Template, prompt_ids, reply_text
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.tokens.chat_template import JINJA, render
from stages.tokens.tools import offer_text
from stages.training.checkpoint import Precision, load_model
from stages.training.distributed import process_group

UNASKED = Reply([], [], False)
Conversation = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], Language]  # turns, tools offered


@dataclasses.dataclass(frozen=True)
class AskJob:
    """Conversations are asked `chunk` at a time; a chunk owns its seed, so replies do not depend on worker counts."""

    checkpoint: str
    conversations: tuple[Conversation, ...]
    template: Template
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    precision: Precision
    chunk: int = 64


@dataclasses.dataclass(frozen=True)
class Said:
    """The reply to conversation `number`: empty, of no token, where the prompt leaves no room for one."""

    number: int
    text: str
    tokens: int
    finished: bool


def ask(job: AskJob, report: Report) -> list[Said]:
    """This rank's share of the replies."""
    with process_group() as ranks, torch.no_grad():
        tokenizer = load_tokenizer(job.checkpoint)
        model = load_model(job.checkpoint, str(ranks.device), job.precision)
        engine = open_engine("native", model, job.checkpoint)
        room = model.config.max_position - job.max_new_tokens
        sampling = Sampling(job.max_new_tokens, job.temperature, job.top_p, (tokenizer.eos,))
        total = len(job.conversations)
        said: list[Said] = []
        for start in range(ranks.rank * job.chunk, total, ranks.world * job.chunk):
            chosen = job.conversations[start : start + job.chunk]
            prompts = [conversation_ids(*conversation, job.template, tokenizer) for conversation in chosen]
            fitting = [number for number, prompt in enumerate(prompts) if len(prompt) <= room]
            asked = [prompts[number] for number in fitting]
            replies = engine.generate(asked, sampling, Random(f"{job.seed}/{start}").getrandbits(62)) if asked else []
            found = dict(zip(fitting, replies, strict=True))
            for number in range(len(prompts)):
                reply = found.get(number, UNASKED)
                text = reply_text(reply.tokens, tokenizer)
                said.append(Said(start + number, text, len(reply.tokens), reply.finished))
            report(min(start + job.chunk * ranks.world, total), total, "conversations")
    return said


def conversation_ids(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    language: Language,
    template: Template,
    tokenizer: Tokenizer,
) -> list[int]:
    """The ids that the reply continues.

    Our chat format offers tools in its own marks. Other templates have other marks, or none: there a system message
    says what the tools are and how to call them. R1-Zero's templates know no turns: a conversation is its lines.
    """
    if tools and not (template == "chat" and tokenizer.template == JINJA):
        messages, tools = [{"role": "system", "content": offer_text(tools)}, *messages], ()
    if template == "chat":
        return render(messages, tokenizer, generation_prompt=True, tools=tools)[0]
    return prompt_ids("\n".join(turn["content"] for turn in messages), template, tokenizer, language=language)
