r"""Import: a set of maths or programming problems of the user's own, JSON Lines, for any later stage.

With `tests_field` answers are programs, and the field holds the tests in the form of HumanEval, MBPP, APPS or our own
(`stages.problems.published_tests`). Else the answer is what `stages.problems.boxed` judges against: the last
`\boxed{…}` of the field (so MATH's `solution` serves), what follows `####` (GSM8K), or the whole field. A question has
Chinese characters or it is English, unless a field says it. A bad line is refused with its file and number: a set that
is half read is another set.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.corpus.sources.files import decode, digest_files, find_files
from stages.problems.boxed import boxed, cut, readings, require, tidy
from stages.problems.problem import Language, Problem, Split, digest, write_problems
from stages.problems.programs import tests_of
from stages.problems.published_tests import UnreadableTests, read_tests
from stages.problems.verify import MAX_ANSWER

SUFFIXES = (".jsonl", ".ndjson", ".json")
SPLITS: tuple[Split, ...] = ("train", "heldout")


class ImportProblemsConfig(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="The problems' family; begins their ids")
    path: str = Field(description="A JSON Lines file, a folder of them or a glob")
    question_field: str = "question"
    answer_field: str | None = Field("answer", description="Column with the answer; may be none if there are tests")
    tests_field: str | None = Field(None, description="Column with tests: the answers are programs that pass them")
    function_field: str | None = Field(None, description="Column with the function's name, as HumanEval's entry_point")
    leave_out_unreadable: bool = Field(False, description="Leave out problems whose tests cannot be read; else refuse")
    solution_field: str | None = Field(None, description="Column with worked solutions, which sft can teach")
    level_field: str | None = Field(None, description="Column with levels: 3, or Level 3; all are 1 when unset")
    language_field: str | None = Field(None, description="Column with en or zh")
    language: Literal["auto", "en", "zh"] = Field("auto", description="auto: zh if a question has Chinese characters")
    license: str = Field(min_length=1, description="SPDX expression, or what the owner calls it")

    @model_validator(mode="after")
    def _something_to_judge_by(self) -> Self:
        if self.answer_field is None and self.tests_field is None:
            raise ValueError("give answer_field or tests_field: a problem is judged by its answer or by its tests")
        if self.tests_field is None and (self.function_field or self.leave_out_unreadable):
            raise ValueError("function_field and leave_out_unreadable are about tests: set tests_field, or leave them")
        return self


def _outside(config: ImportProblemsConfig) -> dict[str, str]:
    return {"files": digest_files(find_files(config.path, SUFFIXES, "path"))}


@stage(version=1, makes="problems", reads=_outside)
def import_problems(config: ImportProblemsConfig, inputs: Inputs, ctx: Context) -> dict:
    """Read problems from JSON Lines; the split is a hash of the question, whichever file it stands in."""
    files = find_files(config.path, SUFFIXES, "path")
    problems: dict[str, Problem] = {}  # by content: a question that comes again is the same problem
    lines = left_out = 0
    for done, file in enumerate(files, start=1):
        for problem in _read(file, config):
            lines += 1
            if problem is None:
                left_out += 1
            else:
                problems.setdefault(problem.content, problem)
        ctx.report(done, len(files), "files")
    if not problems:
        raise InputError(f"path: {config.path!r} has no line to read; give JSON objects, one a line")
    require(problems.values())
    summary: dict = {"name": config.name, "license": config.license, "repeated": lines - left_out - len(problems)}
    if config.tests_field is None:
        numbers = sum(bool(readings(tidy(problem.answer))) for problem in problems.values())
        summary["answers_not_numbers"] = len(problems) - numbers
    else:
        summary["tests"] = sum(len(tests_of(problem.arguments)) for problem in problems.values())
        summary["tests_unreadable"] = left_out
    for split in SPLITS:
        chosen = [problem for problem in problems.values() if problem.split == split]
        summary[f"n_{split}"] = write_problems(ctx.out / f"{split}.jsonl", chosen)
        for language, count in sorted(Counter(problem.language for problem in chosen).items()):
            summary[f"{split}_{language}"] = count
    return summary


def _read(file: Path, config: ImportProblemsConfig) -> Iterator[Problem | None]:
    """The file's problems; None for one that is left out."""
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(decode(line, where))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not a JSON value ({error}); every line must be one object") from None
            if not isinstance(values, dict):
                raise InputError(f"{where}: a line must be a JSON object, this is {type(values).__name__}")
            yield _problem(values, where, config)


def _problem(values: dict[str, Any], where: str, config: ImportProblemsConfig) -> Problem | None:
    question = _text(values, config.question_field, "question_field", where)
    gold = _text(values, config.answer_field, "answer_field", where) if config.answer_field else ""
    answer, verifier = gold, "code"
    if config.tests_field:
        try:
            arguments = _tests(values, config.tests_field, where, config)
        except UnreadableTests as error:
            if config.leave_out_unreadable:
                return None
            raise InputError(
                f"{where}: the tests in the field {config.tests_field!r} cannot be read: {error}; "
                "leave the line out, or set leave_out_unreadable"
            ) from None
    else:
        answer, verifier = cut(gold.rpartition("####")[2]).strip(), "boxed"
        arguments = {"value": answer}
        if len(answer) > MAX_ANSWER or not boxed(answer, arguments):
            raise InputError(
                f"{where}: {answer[:60]!r} in the field {config.answer_field!r} is no answer; give one of at most "
                rf"{MAX_ANSWER} characters, in \boxed{{}} or by itself, or leave the line out"
            )
    language = _language(values, question, where, config)
    if (name := arguments.get("function")) and name not in question:  # MBPP's text leaves it to the tests
        question += {"en": f"\n\nName the function `{name}`.", "zh": f"\n\n函数名为 `{name}`。"}[language]
    content = "".join(unicodedata.normalize("NFKC", question).casefold().split())
    solution = _text(values, config.solution_field, "solution_field", where) if config.solution_field else ""
    return Problem(
        id=f"{config.name}-{language}-{digest(content):016x}",
        family=config.name,
        language=language,
        level=_level(values, where, config),
        question=question,
        chain=solution,
        answer=answer,
        verifier=verifier,
        arguments=arguments,
        content=content,
    )


def _tests(values: dict[str, Any], name: str, where: str, config: ImportProblemsConfig) -> dict[str, Any]:
    tests = _field(values, name, "tests_field", where)
    return read_tests(
        tests, _text(values, config.function_field, "function_field", where) if config.function_field else None
    )


def _text(values: dict[str, Any], name: str, option: str, where: str) -> str:
    """A field's text, which may be written as a number."""
    value = _field(values, name, option, where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: the field {name!r} is {type(value).__name__}, not text; set {option} to another")
    text = str(value).strip()
    if not text:
        raise InputError(f"{where}: the field {name!r} is empty; fill it or leave the line out")
    if re.search("[\ud800-\udfff]", text):
        raise InputError(f"{where}: the field {name!r} has half of a surrogate pair; write the character whole")
    return text


def _field(values: dict[str, Any], name: str, option: str, where: str) -> Any:
    if name not in values:
        have = ", ".join(sorted(values)) or "none"
        raise InputError(f"{where}: no field {name!r} (it has {have}); set {option}")
    return values[name]


def _language(values: dict[str, Any], question: str, where: str, config: ImportProblemsConfig) -> Language:
    if config.language_field is None:
        found: Any = config.language
    else:
        found = _field(values, config.language_field, "language_field", where)
    if found in ("en", "zh"):
        return found
    if config.language_field is not None:
        raise InputError(f"{where}: the field {config.language_field!r} is {found!r}; en and zh are known")
    return "zh" if re.search("[一-鿿]", question) else "en"


def _level(values: dict[str, Any], where: str, config: ImportProblemsConfig) -> int:
    if config.level_field is None:
        return 1
    value = _field(values, config.level_field, "level_field", where)
    match = re.fullmatch(r"(?:Level )?([0-9]{1,4})", str(value))
    if match is None:
        raise InputError(f"{where}: the field {config.level_field!r} is {value!r}; give a number such as 3, or Level 3")
    return int(match[1])
