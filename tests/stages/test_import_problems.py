"""Maths problems of the user's own: read, split, refused by file and line, and learnt from."""

import json

import pytest

from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.stage import Context
from stages.import_problems import ImportProblemsConfig, import_problems
from stages.problems.problem import read_problems
from stages.problems.registry import generate
from stages.problems.selection import ProblemFilter
from stages.problems.verify import judge, require, verify
from stages.sft import SftConfig, sft

QUESTIONS = [(f"What is {n} + {n}?", str(2 * n)) for n in range(60)] + [
    (f"{n}的两倍是多少？", f"{2 * n}") for n in range(60)
]


@pytest.fixture
def write(tmp_path):
    def make(*rows, name="set.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(path)

    return make


def read(path, tmp_path, **options):
    ctx = Context.local(tmp_path / "stage")
    summary = import_problems(ImportProblemsConfig(name="sums", path=path, license="MIT", **options), {}, ctx)
    return summary, {split: list(read_problems(ctx.out / f"{split}.jsonl")) for split in ("train", "heldout")}


def test_problems_are_split_by_their_question_and_judged_by_their_answer(write, tmp_path):
    rows = [{"question": question, "answer": answer} for question, answer in QUESTIONS]
    again = {"question": " what is 1 +  1?", "answer": "2"}  # the second question in other spaces and letters
    summary, splits = read(write(*rows, "", again), tmp_path)
    everything = splits["train"] + splits["heldout"]
    assert (summary["n_train"], summary["n_heldout"]) == tuple(len(splits[split]) for split in ("train", "heldout"))
    assert len(everything) == 120
    assert (summary["repeated"], summary["answers_not_numbers"]) == (1, 0)
    assert min(summary["train_en"], summary["train_zh"]) > 40
    assert summary["n_heldout"] > 2
    assert all(problem.split == split for split, problems in splits.items() for problem in problems)
    for problem in everything:
        assert verify(problem, rf"\boxed{{{problem.answer}}}")
        assert not verify(problem, f"{problem.answer}1")
        assert problem.language == ("en" if problem.question.startswith("What") else "zh")


def test_a_filter_names_families_of_imports_and_an_unknown_one_is_refused_with_the_nearest(write, tmp_path):
    _, splits = read(write(*({"question": q, "answer": a} for q, a in QUESTIONS)), tmp_path)
    problems = splits["train"] + generate(("sort", "chain_sum"), ("en",), 6, 0, "train")
    assert list(ProblemFilter(families=("sums",)).select(problems)) == splits["train"]
    assert {p.family for p in ProblemFilter(families=("sums", "sort")).select(problems)} == {"sums", "sort"}
    with pytest.raises(ConfigError, match=r"problems\.families: no problem is of 'chainsum'; did you mean 'chain_sum'"):
        ProblemFilter(families=("sums", "chainsum")).select(problems)
    with pytest.raises(ConfigError, match="no problem is of 'gcd'; choose from chain_sum, sort, sums"):
        ProblemFilter(families=("gcd",)).select(problems)


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"answer": 72}, "72"),
        ({"answer": 0.5}, "0.5"),
        ({"answer": "She has 70 + 2 = 72.\n#### 72"}, "72"),
        ({"answer": r"Thus $x = \boxed{\frac{3}{4}}$."}, r"\frac{3}{4}"),
    ],
)
def test_the_answer_is_cut_out_of_what_the_published_sets_have(write, tmp_path, given, answer):
    _, splits = read(write({"question": "?", **given}), tmp_path)
    assert [problem.answer for problems in splits.values() for problem in problems] == [answer]


def test_fields_are_named_by_the_config(write, tmp_path):
    row = {"problem": "Double 4.", "solution": r"4+4=\boxed{8}", "level": "Level 3", "lang": "en"}
    names = {"question_field": "problem", "answer_field": "solution", "solution_field": "solution"}
    _, splits = read(write(row), tmp_path, **names, level_field="level", language_field="lang")
    (problem,) = splits["train"] + splits["heldout"]
    assert (problem.question, problem.answer, problem.chain) == ("Double 4.", "8", r"4+4=\boxed{8}")
    assert (problem.level, problem.language, problem.family) == (3, "en", "sums")


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ("{", {}, "not a JSON value"),
        ('{"question": ' + "9" * 5000 + "}", {}, "not a JSON value"),
        ('{"question": "\\ud800", "answer": "1"}', {}, "surrogate"),
        ("[1]", {}, "must be a JSON object, this is list"),
        ({"answer": "1"}, {}, r"no field 'question' \(it has answer\); set question_field"),
        ({"question": "?"}, {}, "no field 'answer'"),
        ({"question": 1.5, "answer": None}, {}, "'answer' is NoneType"),
        ({"question": "?", "answer": True}, {}, "'answer' is bool"),
        ({"question": " ", "answer": "1"}, {}, "'question' is empty"),
        ({"question": "?", "answer": r"\boxed{}"}, {}, "is no answer"),
        ({"question": "?", "answer": "1" * 201}, {}, "is no answer"),
        ({"question": "?", "answer": "1", "level": "hard"}, {"level_field": "level"}, "'level' is 'hard'"),
        ({"question": "?", "answer": "1", "of": "fr"}, {"language_field": "of"}, "'of' is 'fr'; en and zh"),
        ({"question": "?", "answer": "1"}, {"solution_field": "why"}, "set solution_field"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(write, tmp_path, line, options, message):
    good = {"question": "1+1?", "answer": "2", "level": 1, "of": "en", "why": "1+1=2"}
    with pytest.raises(InputError, match=rf"set\.jsonl, line 2: .*{message}"):
        read(write(good, line), tmp_path, **options)


def test_a_path_without_files_or_lines_says_what_to_give(write, tmp_path):
    with pytest.raises(InputError, match=r"path: no file at .*; give a \.jsonl"):
        read(str(tmp_path / "absent"), tmp_path)
    with pytest.raises(InputError, match="no line to read"):
        read(write(), tmp_path)


def test_formulas_without_math_verify_are_refused_before_anything_runs(write, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.problems.boxed.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        read(write({"question": "?", "answer": r"\sqrt{2}"}), tmp_path)


def test_the_id_follows_the_content_of_the_files_and_not_their_place(write, tmp_path):
    (tmp_path / "moved").mkdir()
    paths = [write({"question": "?", "answer": "1"}, name=name) for name in ("a.jsonl", "moved/a.jsonl")]
    configs = [ImportProblemsConfig(name="sums", path=path, license="MIT") for path in paths]
    first, second = (import_problems.external(config) for config in configs)
    assert first == second
    write({"question": "?", "answer": "2"}, name="a.jsonl")
    assert import_problems.external(configs[0]) != first


def test_problems_without_a_worked_solution_cannot_be_taught(write, tmp_path):
    read(write(*({"question": question, "answer": answer} for question, answer in QUESTIONS)), tmp_path)
    problems = Artifact.local(tmp_path / "stage" / "out", "problems")
    with pytest.raises(InputError, match="solution_field"):
        sft(SftConfig(epochs=1), {"checkpoint": problems, "problems": problems}, Context.local(tmp_path / "sft"))


CHECK = (
    "METADATA = {'author': 'jt'}\n\ndef check(candidate):\n    assert candidate(2, 3) == 5, 'sum'\n"
    "    import math\n    assert candidate(2, 3 * 19) == 118 / 2\n    assert candidate('a' + 'b', '') == 'ab'\n"
    "    assert abs(candidate(0.5, 1) - 1.5) < 1e-6\n    assert candidate((1,), ()) == (1,)\n    assert True\n"
    "\ncheck(add)\n"
)
ADD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("tests", "right", "wrong", "n"),
    [
        (CHECK, ADD, "def add(a, b): return [1]", 5),
        (["assert add(2, 3) == 5", "assert add([1], [2]) == [1, 2]"], ADD, "def add(a, b): return 5", 2),
        (["assert less(1, 2)", "assert not less(2, 1)"], "def less(a, b): return a < b", "less = max", 2),
        ({"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [[1, 2]]]}, ADD, "def add(a, b): pass", 2),
        ({"fn_name": "add", "inputs": [[[], [5]], [[1], [2]]], "outputs": [[5], [1, 2]]}, ADD,
         "def add(a, b): return 5 if b == [5] else [1, 2]", 2),
        ('{"inputs": ["1 2\\n", ["3", "4"]], "outputs": ["3\\n", ["7"]]}',
         "import sys\nprint(sum(map(int, sys.stdin.read().split())))", "print(3)", 2),
        ({"function": "add", "calls": [[[1, 2], 3]]}, ADD, "def add(a, b): return 2", 1),
    ],
    ids=["HumanEval", "MBPP", "truth", "APPS, a function", "APPS, lists", "APPS, text", "ours"],
)  # fmt: skip
def test_programs_are_judged_by_the_tests_of_the_published_sets(write, tmp_path, tests, right, wrong, n):
    summary, splits = read(
        write({"question": "Write it.", "tests": tests, "name": "add"}),
        tmp_path,
        answer_field=None,
        tests_field="tests",
        function_field="name",
    )
    (problem,) = splits["train"] + splits["heldout"]
    assert (problem.verifier, problem.answer, summary["tests"]) == ("code", "", n)
    function = problem.arguments.get("function")
    assert problem.question == (f"Write it.\n\nName the function `{function}`." if function else "Write it.")
    try:
        require([problem])
    except ConfigError as error:
        pytest.skip(str(error))
    assert judge(problem, f"```python\n{right}\n```").reason == ""
    assert not judge(problem, wrong).right


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (
            "def check(candidate):\n    import random\n    assert candidate(random.random(), 1)",
            r"'random\.random\(\)' is no literal",
        ),
        (["assert add(1 / 0) == 1"], "'1 / 0' is no literal"),
        (["assert add('a' * 10**9) == 1"], "is no literal"),
        (["assert add(1, x) == 2"], "'x' is no literal"),
        (["assert add(1, 2) == {1, 2}"], "'{1, 2}' is no literal that can be compared"),
        (["assert set(add(1)) == {1}"], r"'add\(1\)' is no literal"),
        (["assert add(1) == 1", "assert sub(1) == 0"], "several functions: add, sub"),
        (["assert add(1) > 0"], "compares no call with a literal"),
        (["assert lib.add(1) == 0"], "is no plain call"),
        ("not a program", "neither JSON nor Python"),
        ([], "no asserts, no inputs"),
        ("def check(candidate): pass", "no assert among them"),
        ({"inputs": ["1"], "outputs": []}, "not two lists of one length"),
        ({"function": "add", "calls": [1]}, "TypeError"),
        ({"function": "add(", "calls": [[[1], 1]]}, r"'add\(' is no name of a function"),
        ({"function": "add", "calls": [["open('x')", 1]]}, "is no literal"),
        ({"fn_name": "Solution.add", "inputs": [[1]], "outputs": [1]}, "no name of a function"),
    ],
)
def test_tests_that_cannot_be_read_are_refused_or_counted(write, tmp_path, tests, message):
    good = {"question": "A", "tests": ["assert add(1) == 1"]}
    path = write(good, {"question": "B", "tests": tests})
    with pytest.raises(
        InputError, match=rf"set\.jsonl, line 2: the tests in the field 'tests' cannot be read: .*{message}"
    ):
        read(path, tmp_path, answer_field=None, tests_field="tests")
    summary, _ = read(path, tmp_path / "again", answer_field=None, tests_field="tests", leave_out_unreadable=True)
    assert (summary["n_train"] + summary["n_heldout"], summary["tests_unreadable"], summary["repeated"]) == (1, 1, 0)


def test_a_config_says_by_what_problems_are_judged():
    about = {"name": "sums", "path": "x", "license": "MIT"}
    with pytest.raises(ValueError, match="give answer_field or tests_field"):
        ImportProblemsConfig(**about, answer_field=None)
    with pytest.raises(ValueError, match="set tests_field"):
        ImportProblemsConfig(**about, function_field="entry_point")
