"""Byte-level BPE with DeepSeek's pre-tokenization and special tokens.

A saved tokenizer is the pair of files the Hugging Face libraries read (`tokenizer.json`, `tokenizer_config.json`), so
transformers and vLLM load it as it is. The normalizer is empty, as DeepSeek's: every byte string round-trips.

Three rules cut the text before any merge (DeepSeek-V3's tokenizer.json):
  1. digits alone (`single`, DeepSeek LLM and V2) or in runs of up to three (`triples`, V3);
  2. a run of Han characters or kana;
  3. letters with at most one leading mark, punctuation together with the newlines behind it (V3, section 4.1), spaces.

`Tokenizer.encode` reads the text of a role marker or of BOS/EOS as ordinary characters: only the chat template and the
corpus writer place those ids, so no document can forge a turn. `<think>` and its kind are ordinary vocabulary, and so
are the marks of tool calls in a vocabulary that was trained with them (`tool_marks`); they have its last ids.

A published model brings a byte-level BPE of its own. What the line needs to know of it is read from the files beside
it (`bos_token`, `eos_token`, `pad_token`, chat template); its marks need not be DeepSeek's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from infra.errors import ConfigError, InputError
from stages.tokens.chat_template import JINJA
from stages.tokens.tools import TOOL_MARKS

Digits = Literal["single", "triples"]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT)
MARKUP_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")  # one id each, but text: they survive decode

CJK_RUN = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_tokenizer(digits: Digits) -> pre_tokenizers.PreTokenizer:
    """The cuts that no merge crosses; see the module's docstring."""
    number = r"\p{N}" if digits == "single" else r"\p{N}{1,3}"
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(rule), "isolated") for rule in (number, CJK_RUN, WORDS)),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class Tokenizer:
    """Text to ids and back, with the ids of its marks as attributes.

    `bos` is None where texts begin without one (Qwen), `pad` is `eos` where the files name none (Llama). `user`,
    `assistant` and the markup are None in a vocabulary that lacks them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_token: str | None = BOS,
        eos_token: str = EOS,
        pad_token: str | None = PAD,
        template: str | None = JINJA,
    ) -> None:
        backend.encode_special_tokens = True  # read markers inside text as plain characters
        self._backend = backend
        self.bos_token, self.eos_token, self.pad_token = bos_token, eos_token, pad_token or eos_token
        self.template = template
        needed = [mark for mark in (bos_token, eos_token, self.pad_token) if mark is not None]
        needed += [USER, ASSISTANT] if template == JINJA else []
        if missing := [mark for mark in needed if backend.token_to_id(mark) is None]:
            raise InputError(f"the vocabulary lacks {missing}, which its tokenizer_config.json or chat template names")
        ids = [backend.token_to_id(mark) for mark in (eos_token, self.pad_token, USER, ASSISTANT, *MARKUP_TOKENS)]
        self.bos = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos, self.pad, self.user, self.assistant = ids[:4]
        self.think, self.end_think, self.answer, self.end_answer = ids[4:]
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: number for number, token in added.items() if token.special}

    @property
    def opening(self) -> list[int]:
        """What a text begins with: BOS, or nothing where the vocabulary has none."""
        return [] if self.bos is None else [self.bos]

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def tokens(self) -> dict[str, int]:
        """The id of every token, added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no BOS, no EOS."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, on all cores that RAYON_NUM_THREADS allows."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a chat template's output, in which the text of a special token means that token."""
        marks = "|".join(re.escape(mark) for mark in sorted(self.special_ids, key=len, reverse=True))
        pieces = re.split(f"({marks})", text) if marks else [text]
        return [
            number
            for piece in pieces
            for number in ([self.special_ids[piece]] if piece in self.special_ids else self.encode(piece))
        ]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 come out as U+FFFD. `<think>` and `<answer>` are text and stay."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, number: int) -> str:
        """The bytes of one id as text, for people to read."""
        return self.decode([number], skip_special=False)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, the chat template inside."""
        directory = Path(directory)
        self._backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "extra_special_tokens": [USER, ASSISTANT],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2**20,
            "chat_template": JINJA,
        }
        text = json.dumps(config, ensure_ascii=False, indent=2)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def train(
    texts: Iterable[str],
    vocab_size: int,
    digits: Digits = "triples",
    min_frequency: int = 2,
    tool_marks: bool = False,
) -> Tokenizer:
    """Learn merges from `texts`. `vocab_size` counts the 9 marks, the 256 bytes and, with `tool_marks`, those of tool
    calls, which come last. Same texts, same bytes out."""
    last = TOOL_MARKS if tool_marks else ()
    floor = len(SPECIAL_TOKENS) + len(MARKUP_TOKENS) + 256 + len(last)
    if vocab_size <= floor:
        raise ConfigError(f"vocab_size={vocab_size} leaves no room for merges: marks and bytes alone take {floor}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(digits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(last),
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*SPECIAL_TOKENS, *MARKUP_TOKENS],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in last])
    # The trainer marks all of them special; the markup must be text.
    state = json.loads(backend.to_str())
    for added in state["added_tokens"]:
        added["special"] = added["content"] in SPECIAL_TOKENS
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state, ensure_ascii=False)))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read a tokenizer saved by `Tokenizer.save`, alone or copied beside a checkpoint or token shards, or a published
    one. InputError names what is missing: the file, the `eos_token`, or a byte-level decoder.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{directory} holds no tokenizer.json: give a tokenizer, tokens or checkpoint artifact")
    backend = tokenizers.Tokenizer.from_file(str(path))
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise InputError(f"{path}: its decoder is not ByteLevel; only byte-level vocabularies are implemented")
    said = read_settings(Path(directory))
    if said.get("eos_token") is None:
        raise InputError(f"{directory}: tokenizer_config.json names no eos_token, and a reply could not end: add it")
    tokens = {name: said.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return Tokenizer(backend, **tokens, template=said.get("chat_template"))


def read_settings(directory: Path) -> dict[str, Any]:
    """What the files beside tokenizer.json say: tokens as text, the default chat template; absent what is null."""
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has the last word
        if (directory / name).is_file():
            said |= json.loads((directory / name).read_text(encoding="utf-8"))
    said = {name: value["content"] if isinstance(value, dict) and "content" in value else value
            for name, value in said.items() if value is not None}  # fmt: skip
    if isinstance(template := said.get("chat_template"), list):  # several by name
        said["chat_template"] = {one["name"]: one["template"] for one in template}.get("default")
    if (directory / "chat_template.jinja").is_file():
        said["chat_template"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    return said
