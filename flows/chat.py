"""Talk to a checkpoint in the terminal. What stands inside <think> is shown dim, what stands inside <answer> is not.

The generator is the line's own (`model.generate`); it samples a whole reply, which is then printed.
"""

from __future__ import annotations

import re

import torch
from rich.console import Console
from rich.text import Text

from infra.artifact import Artifact
from infra.errors import InputError
from model.generate import Generator
from stages.rl.prompts import reply_text
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.tokens.chat_template import render
from stages.training.checkpoint import load_model

THINK = re.compile(r"(<think>.*?(?:</think>|$))", re.DOTALL)
MARKS = re.compile(r"</?(?:think|answer)>")
Message = dict[str, str]


def converse(
    artifact: Artifact, prompt: str | None, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> None:
    """Answer `prompt`, or question after question from the terminal until its end (Ctrl-D)."""
    if artifact.kind != "checkpoint":
        raise InputError(f"{artifact.id} is a {artifact.kind}: chat needs a checkpoint")
    tokenizer = load_tokenizer(artifact.path)
    generator = Generator(load_model(artifact.path))
    longest = generator.model.config.max_position
    random = torch.Generator().manual_seed(seed)
    console = Console(highlight=False)
    messages: list[Message] = []
    while (question := prompt or _ask(console)) is not None:
        messages.append({"role": "user", "content": question})
        ids = _fitting(messages, tokenizer, longest - max_new_tokens)
        reply = generator.generate([ids], max_new_tokens, temperature, top_p, (tokenizer.eos,), random)[0]
        text = reply_text(reply.tokens, tokenizer)
        messages.append({"role": "assistant", "content": text})
        console.print(shown(text if reply.finished else text + " …"))
        if prompt is not None:
            return


def shown(reply: str) -> Text:
    """A reply for the terminal: its thinking dim on lines of its own, the markers left out."""
    text = Text()
    for part in THINK.split(reply):
        words = MARKS.sub("", part).strip()
        if words:
            text.append("\n" if text else "")
            text.append(words, style="dim" if part.startswith("<think>") else "")
    return text


def _ask(console: Console) -> str | None:
    while True:
        try:
            question = console.input("[bold]> [/]").strip()
        except EOFError:
            return None
        if question:
            return question


def _fitting(messages: list[Message], tokenizer: Tokenizer, room: int) -> list[int]:
    """Ids of the conversation, its oldest turns dropped (from `messages` too) until they fit."""
    while True:
        ids, _ = render(messages, tokenizer, generation_prompt=True)
        if len(ids) <= room:
            return ids
        if len(messages) == 1:
            raise InputError(f"the question has {len(ids)} tokens and {room} fit: shorten it or --max-new-tokens")
        del messages[:2]
