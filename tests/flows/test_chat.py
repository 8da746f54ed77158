"""`fathom chat` on a real checkpoint: text as it comes, thinking apart, the history cut to what fits."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from flows.chat import Screen, fitting
from infra.errors import InputError
from infra.store import ArtifactStore
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.tokens.chat_template import render

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def screen() -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(Console(file=out, force_terminal=True, highlight=False, width=20)), out


@pytest.mark.parametrize("size", [1, 3, 100])
def test_thinking_is_dim_on_its_own_lines_and_the_marks_are_left_out(size: int) -> None:
    shown, out = screen()
    text = "<think> so  three\nmore </think>\n<answer>7, a rather long line</answer>\n"
    for start in range(0, len(text), size):
        shown.show(text[start : start + size])
    shown.close("")
    plain = out.getvalue().replace(DIM, "").replace(PLAIN, "")
    assert plain == "so  three\nmore\n7, a rather long line\n"
    thinking, _, answer = out.getvalue().partition("7")
    assert DIM in thinking
    assert DIM not in answer


def test_what_is_certain_is_on_the_screen_before_the_reply_ends() -> None:
    shown, out = screen()
    shown.show("one two </ans")
    assert out.getvalue() == "one two"
    shown.show("wers>")
    assert out.getvalue() == "one two </answers>"
    shown.close(" …")
    assert out.getvalue() == "one two </answers> …\n"


def test_the_oldest_turns_are_dropped_until_the_conversation_fits(chat_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(chat_checkpoint)
    turns = [("Pull 1.", "so 1"), ("Pull 2.", "so 2"), ("Pull 3.", None)]
    messages = [
        {"role": role, "content": text}
        for question, reply in turns
        for role, text in (("user", question), ("assistant", reply))
        if text is not None
    ]
    whole, _ = render(messages, tokenizer, generation_prompt=True)
    assert fitting(messages, tokenizer, len(whole)) == whole
    shorter = fitting(messages, tokenizer, len(whole) - 1)
    assert [message["content"] for message in messages] == ["Pull 2.", "so 2", "Pull 3."]
    assert shorter == render(messages, tokenizer, generation_prompt=True)[0]
    with pytest.raises(InputError, match="shorten it or --max-new-tokens"):
        fitting(messages, tokenizer, 3)


def test_the_command_answers_and_keeps_the_history(chat_store: ArtifactStore) -> None:
    def chat(*arguments: str, typed: str | None = None) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "chat", "arm@latest", "--max-new-tokens", "14", *arguments],
            env={**os.environ, "FATHOM_STORE": str(chat_store.root)},
            input=typed,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    once = chat("--prompt", "Pull 3.", "--temperature", "0")
    assert once.splitlines()[0] == "so"
    assert once.splitlines()[1].strip().isdigit()
    assert "<" not in once
    twice = chat("--temperature", "0", typed="Pull 3.\n\nPull 3.\n")
    assert twice.count("so") >= 1
    assert twice.startswith("> so")


def test_a_tokenizer_of_bytes_never_breaks_a_character_on_the_screen(chat_checkpoint: Path) -> None:
    from stages.tokens.text_stream import TextStream

    tokenizer: Tokenizer = load_tokenizer(chat_checkpoint)
    shown, out = screen()
    stream = TextStream(tokenizer)
    for token in tokenizer.encode("七 🙂"):
        shown.show(stream.push([token]))
        assert "\ufffd" not in out.getvalue()
    shown.close(stream.close())
    assert out.getvalue() == "七 🙂\n"
