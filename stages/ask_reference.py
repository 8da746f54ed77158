"""General conversations from reference documents: what a field is, what a class is for, and translations.

DeepSeek-R1 fine-tunes on 600K reasoning samples and 200K of other kinds (section 2.3.3), so that what is learnt of
reasoning costs nothing else. These are the other kinds for a model without internet: questions with known answers about
`api_reference_en` and `api_reference_zh`, in either language. A class that both sources describe (they can be read
side by side if each SDK is installed in a folder of its own) is asked for in both, and translated field by field.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, many, stage
from stages.corpus.document import fraction, read_documents
from stages.corpus.languages import identify
from stages.problems.problem import Language
from stages.training.supervised import CONVERSATIONS

COLON: Mapping[Language, str] = {"en": ": ", "zh": "："}
ASKED: Mapping[Language, Mapping[str, str]] = {
    "en": {"field": "What is {field} in {name}?", "class": "What is {name}?", "translation": "Into Chinese: {text}"},
    "zh": {"field": "{name}里的{field}是什么？", "class": "{name}是什么？", "translation": "译成英文：{text}"},
}
ENVELOPES = ("Request", "Response")  # what they are for is only their name again
OTHER: Mapping[Language, Language] = {"en": "zh", "zh": "en"}


class AskReferenceConfig(Config):
    per_document: int = Field(2, ge=1, title="Questions a document", description="At most")
    min_characters: int = Field(12, ge=1, title="Shortest answer", description="Characters")
    max_characters: int = Field(400, ge=1, title="Longest answer", description="Characters; longer ones are left out")
    max_conversations: int | None = Field(None, ge=1, title="At most", description="Drawn evenly; None: all")
    seed: int = Field(0, title="Seed")


@dataclass(frozen=True)
class Asked:
    id: str
    kind: str  # field, class or translation
    language: Language  # of the answer
    question: str
    answer: str


@stage(version=1, takes={"documents": many("documents")}, makes="conversations")
def ask_reference(config: AskReferenceConfig, inputs: Inputs, ctx: Context) -> dict:
    """Make questions with known answers of API reference documents, English and Chinese."""
    texts: dict[Language, dict[str, str]] = {"en": {}, "zh": {}}
    for artifact in inputs["documents"]:
        for document in read_documents(artifact.path):
            source, _, key = document.id.partition("/")
            for language in texts:
                if source == f"api_reference_{language}":
                    texts[language][key] = document.text
    if not any(texts.values()):
        raise InputError("documents: there is no document of api_reference_en or api_reference_zh; ingest one of them")
    asked: dict[tuple[str, str], Asked] = {}  # by kind and answer: what many classes repeat is asked for once
    for language, of_language in texts.items():
        for key, text in sorted(of_language.items()):
            found = list(_questions(key, text, texts[OTHER[language]].get(key), language, config))
            found.sort(key=lambda one: fraction(one.id, f"question {config.seed}"))
            for one in found[: config.per_document]:
                asked.setdefault((one.kind, one.answer), one)
    chosen = sorted(asked.values(), key=lambda one: fraction(one.id, f"conversation {config.seed}"))
    chosen = chosen[: config.max_conversations]
    if not chosen:
        raise InputError(
            f"no answer has {config.min_characters} to {config.max_characters} characters: lower min_characters or "
            "raise max_characters"
        )
    rows = []
    for one in chosen:
        messages = [{"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}]
        text = json.dumps(messages, ensure_ascii=False)
        rows.append({"id": one.id, "messages": text, "language": one.language, "family": f"reference_{one.kind}"})
    pq.write_table(pa.Table.from_pylist(rows, CONVERSATIONS), ctx.out / "conversations-00000.parquet")
    counts = Counter(f"{one.kind}_{one.language}" for one in chosen)
    return {
        "conversations": len(rows),
        "left_out": len(asked) - len(rows),
        "characters_learnt": sum(len(one.answer) for one in chosen),
        **dict(sorted(counts.items())),
    }


def _questions(
    key: str, text: str, other: str | None, language: Language, config: AskReferenceConfig
) -> Iterator[Asked]:
    """All that can be asked about one document; `other` is the same in the other language."""
    name, purpose, fields = parse(text, language)
    words = ASKED[language]
    where = f"api_reference_{language}/{key}"

    def fits(answer: str, language: Language = language) -> bool:
        # Some texts of the English reference were never translated.
        return config.min_characters <= len(answer) <= config.max_characters and identify(answer) == language

    if fits(purpose) and not name.endswith(ENVELOPES):
        yield Asked(where, "class", language, words["class"].format(name=name), purpose)
    translated = parse(other, OTHER[language])[2] if other else {}
    for field, about in fields.items():
        if fits(about):
            yield Asked(f"{where}/{field}", "field", language, words["field"].format(field=field, name=name), about)
        meant = translated.get(field, "")
        if fits(about) and fits(meant, OTHER[language]):
            question = words["translation"].format(text=about)
            yield Asked(f"{where}/{field}/translation", "translation", OTHER[language], question, meant)


def parse(text: str, language: Language) -> tuple[str, str, dict[str, str]]:
    """(name, purpose, description by field) of a document of `ApiReference`, whose form this is the inverse of.

    A line that names no field goes on with what stands before it.
    """
    name, _, rest = text.partition("\n")
    purpose: list[str] = []
    fields: dict[str, list[str]] = {}
    lines = purpose
    for line in rest.splitlines():
        field, colon, about = line.partition(COLON[language])
        if colon and field.isascii() and field.isidentifier():
            lines = fields.setdefault(field, [])
            line = about
        lines.append(line)
    return name, "\n".join(purpose).strip(), {field: "\n".join(about).strip() for field, about in fields.items()}
