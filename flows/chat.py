"""Talk to a checkpoint in the terminal. The reply is printed as it is sampled; what stands inside <think> is dim and
apart, the markers of thinking and answer are left out.

The generator is the line's own (`model.generate`). The history is kept over turns, thinking included, as the model was
trained on it; the oldest turns are dropped when the conversation no longer fits.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.text import Text

from infra.artifact import Artifact
from infra.errors import InputError
from model.generate import Generator
from stages.rl.prompts import reply_text
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.tokens.chat_template import render
from stages.tokens.text_stream import TextStream, ThinkingStream, hold_back
from stages.training.checkpoint import load_model

ANSWER_MARKS = ("<answer>", "</answer>")
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
        ids = fitting(messages, tokenizer, longest - max_new_tokens)
        screen, text, tokens, finished = Screen(console), TextStream(tokenizer), [], False
        for piece in generator.stream([ids], max_new_tokens, temperature, top_p, (tokenizer.eos,), random):
            screen.show(text.push([token for token in piece.tokens if token != tokenizer.eos]))
            tokens += piece.tokens
            finished = piece.finished
        screen.close(text.close() + ("" if finished else " …"))
        messages.append({"role": "assistant", "content": reply_text(tokens, tokenizer)})
        if prompt is not None:
            return


class Screen:
    """Prints a reply as its text comes: thinking dim, thinking and answer each on lines of its own."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stretches = ThinkingStream()
        self._thinking = False
        self._begun = False  # whether the stretch of now has printed anything
        self._held = ""  # spaces that may be its last, and what may be the beginning of a mark

    def show(self, text: str) -> None:
        for said in self._stretches.push(text):
            self._say(*said)

    def close(self, rest: str) -> None:
        self.show(rest)
        for said in self._stretches.close():
            self._say(*said)
        self._write(self._held.rstrip())
        self._console.print()

    def _say(self, text: str, thinking: bool) -> None:
        if thinking != self._thinking:
            self._write(self._held.rstrip())
            if self._begun:
                self._console.print()
            self._thinking, self._begun, self._held = thinking, False, ""
        text = self._held + text
        for mark in ANSWER_MARKS:
            text = text.replace(mark, "")
        text, mark = hold_back(text if self._begun else text.lstrip(), ANSWER_MARKS)
        ready = text.rstrip()
        self._held = text[len(ready) :] + mark
        self._write(ready)

    def _write(self, text: str) -> None:
        if text:  # soft_wrap: the terminal breaks lines that come in pieces
            self._console.print(Text(text, style="dim" if self._thinking else ""), end="", soft_wrap=True)
            self._begun = True


def _ask(console: Console) -> str | None:
    while True:
        try:
            question = console.input("[bold]> [/]").strip()
        except EOFError:
            return None
        if question:
            return question


def fitting(messages: list[Message], tokenizer: Tokenizer, room: int) -> list[int]:
    """Ids of the conversation, its oldest turns dropped (from `messages` too) until they fit."""
    while True:
        ids, _ = render(messages, tokenizer, generation_prompt=True)
        if len(ids) <= room:
            return ids
        if len(messages) == 1:
            raise InputError(f"the question has {len(ids)} tokens and {room} fit: shorten it or --max-new-tokens")
        del messages[:2]
