"""Tests as sets of programming problems have them, as the `arguments` of our verifier `code`.

HumanEval: the text of a function `check(candidate)` and the name of the function that it checks. MBPP: a list of
asserts. APPS: {"inputs": […], "outputs": […]}, with "fn_name" where a function is called. Ours: as
`stages.problems.programs` has it.

Asserts are read and never run, for their expected values must stay out of the process that runs the reply: an assert is
a test if it compares one call with literal arguments to a literal.
"""

from __future__ import annotations

import ast
import json
import operator
from typing import Any

from stages.problems.programs import tests_of


class UnreadableTests(ValueError):
    """Says which part of the tests is none of the known forms."""


def read_tests(value: Any, function: str | None) -> dict[str, Any]:
    """`arguments` for the verifier `code`; `function` is the name that HumanEval's `candidate` stands for."""
    arguments = _read(value, function)
    if "calls" in arguments:
        if not str(arguments["function"]).isidentifier():
            raise UnreadableTests(f"{arguments['function']!r} is no name of a function")
        for given, _ in arguments["calls"]:
            if isinstance(given, str):
                _literal(ast.parse(given, mode="eval").body, as_json=False)
    return arguments


def _read(value: Any, function: str | None) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return _calls(_asserts(value), function)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return _calls([test for text in value for test in _asserts(text)], function)
    if isinstance(value, dict) and {"inputs", "outputs"} <= value.keys():
        return _apps(value)
    if isinstance(value, dict) and ("calls" in value or "inputs" in value):
        try:
            if tests_of(value):
                return value
        except (KeyError, TypeError, ValueError) as error:
            raise UnreadableTests(f"{type(error).__name__}: {error}") from None
    raise UnreadableTests("they are no asserts, no inputs with outputs, and no calls")


def _apps(value: dict[str, Any]) -> dict[str, Any]:
    inputs, outputs = value["inputs"], value["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise UnreadableTests("inputs and outputs are not two lists of one length")
    if name := value.get("fn_name"):
        # APPS wraps the values of most functions in a list of one, those of one function all alike.
        wrapped = all(isinstance(told, list) and len(told) == 1 for told in outputs)
        values = [told[0] for told in outputs] if wrapped else outputs
        if not all(isinstance(given, list) for given in inputs):
            raise UnreadableTests("the inputs of a function are no lists of arguments")
        return {"function": name, "calls": [list(pair) for pair in zip(inputs, values, strict=True)]}
    return {"inputs": [[_lines(given), _lines(told)] for given, told in zip(inputs, outputs, strict=True)]}


def _lines(value: Any) -> str:
    text = "\n".join(map(str, value)) if isinstance(value, list) else value
    if not isinstance(text, str):
        raise UnreadableTests(f"{value!r:.60} is no text")
    return text


Call = tuple[str, str, Any]  # name, arguments as a literal, value


def _asserts(text: str) -> list[Call]:
    """The asserts of a text, at its top or inside its functions."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UnreadableTests("their text is neither JSON nor Python") from None
    found: list[Call] = []
    statements = list(tree.body)
    while statements:
        statement = statements.pop(0)
        match statement:
            case ast.FunctionDef(body=body):
                statements = body + statements
            case ast.Assert(test=test):
                found.append(_assert(test))
            case ast.Import() | ast.ImportFrom():
                continue  # an assert that needs one is no comparison of literals, and is refused as such
            case ast.Assign(targets=[ast.Name(id="METADATA")]) | ast.Expr(value=ast.Constant()) | ast.Pass():
                continue
            case ast.Expr(value=ast.Call(func=ast.Name(id="check"))):
                continue  # that HumanEval's check is called
            case _:
                raise UnreadableTests(f"{ast.unparse(statement)[:60]!r} is no assert")
    return [call for call in found if call[0]]


def _assert(test: ast.expr) -> Call:
    match test:
        case ast.Compare(left=ast.Call() as call, ops=[ast.Eq() | ast.Is()], comparators=[value]):
            return (*_call(call), _literal(value))
        case ast.Compare(left=value, ops=[ast.Eq() | ast.Is()], comparators=[ast.Call() as call]):
            return (*_call(call), _literal(value))
        case ast.Compare(  # abs(f(…) - 0.5) < 1e-6; our own tolerance is narrower
            left=ast.Call(
                func=ast.Name(id="abs"), args=[ast.BinOp(left=ast.Call() as call, op=ast.Sub(), right=value)]
            ),
            ops=[ast.Lt()],
            comparators=[ast.Constant()],
        ):
            return (*_call(call), _literal(value))
        case ast.UnaryOp(op=ast.Not(), operand=ast.Call() as call):
            return (*_call(call), False)
        case ast.Call():
            return (*_call(test), True)
        case ast.Constant(value=True):  # HumanEval has some of these
            return ("", "", None)
    raise UnreadableTests(f"{ast.unparse(test)[:60]!r} compares no call with a literal")


def _call(call: ast.Call) -> tuple[str, str]:
    if not isinstance(call.func, ast.Name) or call.keywords:
        raise UnreadableTests(f"{ast.unparse(call)[:60]!r} is no plain call")
    given = tuple(_literal(argument, as_json=False) for argument in call.args)
    return call.func.id, repr(given)


SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class _Folded(ast.NodeTransformer):
    """Sums and products of constants, such as 3 * 19, as constants. Strings and lists are added, not multiplied."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        match node:
            case ast.BinOp(left=ast.Constant(value=left), right=ast.Constant(value=right)):
                numbers = all(type(side) in (int, float) for side in (left, right))
                texts = isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str)
                if (sign := SIGNS.get(type(node.op))) and (numbers or texts):
                    return ast.Constant(sign(left, right))
        return node


def _literal(node: ast.expr, as_json: bool = True) -> Any:
    try:
        value = ast.literal_eval(_Folded().visit(node))
        if as_json:
            json.dumps(value, allow_nan=False)
        return value
    except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        raise UnreadableTests(f"{ast.unparse(node)[:60]!r} is no literal that can be compared") from None


def _calls(calls: list[Call], function: str | None) -> dict[str, Any]:
    if not calls:
        raise UnreadableTests("there is no assert among them")
    names = {name for name, _, _ in calls}
    if len(names) > 1:
        raise UnreadableTests(f"they call several functions: {', '.join(sorted(names))}")
    (name,) = names
    if name == "candidate":
        if not function:
            raise UnreadableTests("they call `candidate`, and no field names the function")
        name = function
    return {"function": name, "calls": [[given, value] for _, given, value in calls]}
