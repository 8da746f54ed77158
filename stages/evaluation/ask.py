"""Conversations put to a checkpoint, one reply each, as one SPMD program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch

from infra.metrics import Report
from stages.rl.engines import open_engine
from stages.rl.engines.base import Sampling
from stages.rl.prompts import Template, prompt_ids, reply_text
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.tokens.chat_template import render
from stages.tokens.tools import offer_text
from stages.training.checkpoint import load_model
from stages.training.distributed import process_group

Conversation = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]  # messages, and the tools offered


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
    chunk: int = 64


@dataclasses.dataclass(frozen=True)
class Said:
    """The reply to conversation `number`."""

    number: int
    text: str
    tokens: int
    finished: bool


def ask(job: AskJob, report: Report) -> list[Said]:
    """This rank's share of the replies."""
    with process_group() as ranks, torch.no_grad():
        tokenizer = load_tokenizer(job.checkpoint)
        engine = open_engine("native", load_model(job.checkpoint, str(ranks.device)), job.checkpoint)
        sampling = Sampling(job.max_new_tokens, job.temperature, job.top_p, (tokenizer.eos,))
        total = len(job.conversations)
        said: list[Said] = []
        for start in range(ranks.rank * job.chunk, total, ranks.world * job.chunk):
            chosen = job.conversations[start : start + job.chunk]
            prompts = [conversation_ids(*conversation, job.template, tokenizer) for conversation in chosen]
            replies = engine.generate(prompts, sampling, Random(f"{job.seed}/{start}").getrandbits(62))
            said += [
                Said(start + number, reply_text(reply.tokens, tokenizer), len(reply.tokens), reply.finished)
                for number, reply in enumerate(replies)
            ]
            report(min(start + job.chunk * ranks.world, total), total, "conversations")
    return said


def conversation_ids(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    tokenizer: Tokenizer,
) -> list[int]:
    """The ids that the reply continues. R1-Zero's template knows no turns: there a conversation is its lines, behind
    what the tools are."""
    if template == "chat":
        return render(messages, tokenizer, generation_prompt=True, tools=tools)[0]
    lines = [offer_text(tools)] if tools else []
    return prompt_ids("\n".join([*lines, *(message["content"] for message in messages)]), template, tokenizer)
