"""The line as a graph: which stages, on which inputs, in which order. Declarations only; nothing here runs anything.

A node is one use of a stage, so a stage can appear several times (`grpo` is `r1_zero`, `reasoning_rl` and `final_rl`).
`LINE` names every node of the road once; a smaller pipeline is what its targets need of it. `scaling` branches off from
the corpus, `iterative` from the cold start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import stages
from infra.config import nearest
from infra.errors import ConfigError
from infra.stage import Stage

Load = Callable[[str], Stage]


def flat(inputs: Mapping[str, str | Mapping[str, str]]) -> dict[str, str]:
    """{role: x} and {role: {name: x}} as {role: x} and {role.name: x}."""
    found: dict[str, str] = {}
    for role, source in inputs.items():
        if isinstance(source, str):
            found[role] = source
        else:
            found |= {f"{role}.{name}": one for name, one in source.items()}
    return found


def nested(roles: Mapping[str, str]) -> dict[str, Any]:
    """The opposite of `flat`."""
    found: dict[str, Any] = {}
    for role, source in roles.items():
        name, dot, part = role.partition(".")
        if dot:
            found.setdefault(name, {})[part] = source
        else:
            found[name] = source
    return found


@dataclass(frozen=True)
class Node:
    """One use of a stage: role → node, or role → {name: node} for a role of many."""

    name: str
    stage: str
    inputs: Mapping[str, str | Mapping[str, str]] = field(default_factory=dict)

    @property
    def roles(self) -> dict[str, str]:
        """`role` or `role.name` → node, as `infra.stage` writes them."""
        return flat(self.inputs)


@dataclass(frozen=True)
class Pipeline:
    """Nodes in an order in which every node comes after its inputs."""

    name: str
    doc: str
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for node in self.nodes:
            assert node.name not in seen, f"{self.name}: two nodes are called {node.name}"
            late = set(node.roles.values()) - seen
            assert not late, f"{self.name}: {node.name} takes {late} before it is made"
            seen.add(node.name)

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    def node(self, name: str) -> Node:
        """The node of that name; ConfigError names the nearest right one."""
        if name not in self.by_name:
            raise ConfigError(f"pipeline {self.name} has no node {name!r}; {nearest(name, self.by_name)}")
        return self.by_name[name]

    def upstream(self, names: Iterable[str]) -> set[str]:
        """The nodes and all that they are made from."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self.node(name).roles.values()
        return found

    def downstream(self, name: str) -> set[str]:
        """The node and all that is made from it."""
        found = {self.node(name).name}
        for node in self.nodes:
            if found & set(node.roles.values()):
                found.add(node.name)
        return found

    def part(self, name: str, doc: str, targets: Iterable[str]) -> Pipeline:
        """The pipeline that makes the targets and nothing that they do not need."""
        kept = self.upstream(targets)
        return Pipeline(name, doc, tuple(node for node in self.nodes if node.name in kept))

    def branch(self, name: str, doc: str, *nodes: Node) -> Pipeline:
        """The pipeline of further nodes and of all that they need of this one, which may have some of them too."""
        own = {node.name: node for node in nodes}
        needed = {source for node in nodes for source in node.roles.values()} - own.keys()
        kept = self.upstream(needed) - own.keys()
        return Pipeline(name, doc, (*(node for node in self.nodes if node.name in kept), *nodes))

    def check(self, load: Load = stages.load) -> None:
        """Raise ConfigError if a node's inputs are not the roles and kinds that its stage takes."""
        for node in self.nodes:
            stage = load(node.stage)
            stage.check_roles(node.roles)
            for role, source in node.roles.items():
                wanted, makes = stage.takes[role.partition(".")[0]], load(self.by_name[source].stage).makes
                if makes not in wanted.kinds:
                    raise ConfigError(f"{node.name}: input {role} takes {wanted.kind}, but {source} makes {makes}")


def _evaluate(name: str, checkpoint: str) -> Node:
    # The base model is held against a byte trigram of the same text too.
    text = {"tokens": "tokenize"} if name == "base" else {}
    return Node(f"evaluate_{name}", "evaluate", {"checkpoint": checkpoint, "problems": "generate_problems", **text})


def _rl(name: str, checkpoint: str) -> Node:
    return Node(name, "grpo", {"checkpoint": checkpoint, "problems": "generate_problems"})


INGESTS = ("api_zh", "api_en", "python_docs", "python_code", "math")
EVALUATED = {
    "base": "extend_context",
    "r1_zero": "r1_zero",
    "cold_start": "cold_start",
    "reasoning_rl": "reasoning_rl",
    "r1": "final_rl",
    "distill_llama": "distill_llama",
    "distill_qwen": "distill_qwen",
    "rl_student_llama": "rl_student_llama",
}
_EVALUATIONS = {name: _evaluate(name, checkpoint) for name, checkpoint in EVALUATED.items()}

LINE = Pipeline(
    "line",
    "The whole road: corpus, base, R1-Zero, R1, students, evaluations, report",
    (
        *(Node(f"ingest_{name}", "ingest") for name in INGESTS),
        Node("deduplicate", "deduplicate", {"documents": {name: f"ingest_{name}" for name in INGESTS}}),
        Node("filter", "filter", {"documents": "deduplicate"}),
        Node("mix", "mix", {"documents": "filter"}),
        Node("train_tokenizer", "train_tokenizer", {"documents": "mix"}),
        Node("tokenize", "tokenize", {"documents": "mix", "tokenizer": "train_tokenizer"}),
        Node("generate_problems", "generate_problems"),
        Node("pretrain", "pretrain", {"tokens": "tokenize"}),
        Node("extend_context", "extend_context", {"checkpoint": "pretrain", "tokens": "tokenize"}),
        _EVALUATIONS["base"],
        _rl("r1_zero", "extend_context"),
        _EVALUATIONS["r1_zero"],
        Node("sample_zero", "sample", {"checkpoint": "r1_zero", "problems": "generate_problems"}),
        Node("cold_start_samples", "rejection_sample", {"rollouts": "sample_zero"}),
        Node("cold_start", "sft", {"checkpoint": "extend_context", "conversations": "cold_start_samples"}),
        _EVALUATIONS["cold_start"],
        _rl("reasoning_rl", "cold_start"),
        _EVALUATIONS["reasoning_rl"],
        Node("sample", "sample", {"checkpoint": "reasoning_rl", "problems": "generate_problems"}),
        Node("rejection_sample", "rejection_sample", {"rollouts": "sample"}),
        Node("general", "ask_reference", {"documents": {name: f"ingest_{name}" for name in ("api_zh", "api_en")}}),
        Node(
            "sft",
            "sft",
            {"checkpoint": "extend_context", "conversations": "rejection_sample", "general": "general"},
        ),
        _rl("final_rl", "sft"),
        _EVALUATIONS["r1"],
        Node("sample_teacher", "sample", {"checkpoint": "final_rl", "problems": "generate_problems"}),
        Node("teacher_samples", "rejection_sample", {"rollouts": "sample_teacher"}),
        Node("student_base_llama", "pretrain", {"tokens": "tokenize"}),
        Node("student_base_qwen", "pretrain", {"tokens": "tokenize"}),
        Node("distill_llama", "distill", {"student": "student_base_llama", "conversations": "teacher_samples"}),
        Node("distill_qwen", "distill", {"student": "student_base_qwen", "conversations": "teacher_samples"}),
        _rl("rl_student_llama", "student_base_llama"),
        _EVALUATIONS["distill_llama"],
        _EVALUATIONS["distill_qwen"],
        _EVALUATIONS["rl_student_llama"],
        Node("report", "report", {"evaluations": {name: node.name for name, node in _EVALUATIONS.items()}}),
    ),
)

ROUNDS = 2


def _rounds() -> tuple[Node, ...]:
    """Iterative GRPO (DeepSeekMath, algorithm 1). A round's reward model learns on from what the policy said last, with
    earlier pairs replayed; the reference is the policy that the round begins with."""
    problems = {"problems": "generate_problems"}
    nodes = [Node("sample_start", "sample", {"checkpoint": "cold_start", **problems})]
    policy, said, judge = "cold_start", "sample_start", "cold_start"
    pairs: dict[str, str] = {}
    for number in range(1, ROUNDS + 1):
        new = f"preferences_{number}"
        nodes.append(Node(new, "make_preferences", {"rollouts": said}))
        learnt = {"checkpoint": judge, "preferences": new, **({"replay": dict(pairs)} if pairs else {})}
        judge = f"reward_model_{number}"
        nodes.append(Node(judge, "train_reward_model", learnt))
        nodes.append(Node(f"iterative_rl_{number}", "grpo", {"checkpoint": policy, "reward_model": judge, **problems}))
        policy = said = f"iterative_rl_{number}"
        pairs[f"round_{number}"] = new
    return (*nodes, _evaluate("iterative_rl", policy))


# DeepSeek-V3 learns R1's reasoning and its own brevity (V3, section 5.1): an expert of worked replies and, behind a
# system prompt, of R1's; reinforcement learning blends the two; its shortest right replies are for the final model.
_V3 = LINE.branch(
    "v3_from_r1",
    "R1's reasoning with control of its length: an expert, its concise replies, SFT of the base",
    Node("r1_patterns", "rejection_sample", {"rollouts": "sample_teacher"}),
    Node(
        "expert",
        "sft",
        {"checkpoint": "extend_context", "conversations": "r1_patterns", "problems": "generate_problems"},
    ),
    _rl("expert_rl", "expert"),
    Node("sample_expert", "sample", {"checkpoint": "expert_rl", "problems": "generate_problems"}),
    Node("concise", "rejection_sample", {"rollouts": "sample_expert"}),
    Node("v3_sft", "sft", {"checkpoint": "extend_context", "conversations": "concise", "general": "general"}),
    _EVALUATIONS["r1"],
    _evaluate("v3_sft", "v3_sft"),
    Node("report_v3", "report", {"evaluations": {"r1": "evaluate_r1", "v3": "evaluate_v3_sft"}}),
)

# DeepSeek-R1, section 4.1, at equal compute: the student's training is as long as reinforcement learning of the same
# student pays for, once without and once with what the teacher spent on its samples.
_ARMS = ("distill_equal", "distill_equal_all", "rl_student_llama")
_EQUAL = LINE.branch(
    "distill_or_rl",
    "Distillation against reinforcement learning of the same student at equal compute",
    *(
        Node(
            name,
            "distill",
            {"student": "student_base_llama", "conversations": "teacher_samples", "rival": "rl_student_llama"},
        )
        for name in _ARMS[:2]
    ),
    *(_evaluate(name, name) for name in _ARMS[:2]),
    _EVALUATIONS["rl_student_llama"],
    Node("report_equal", "report", {"evaluations": {name: f"evaluate_{name}" for name in _ARMS}}),
)

# DeepSeek-R1, section 2.3.4: the last reinforcement learning is over all scenarios. Rules judge the problems; general
# prompts are judged by a reward model, which learns whether a reply answers its prompt. R1 without them stands beside.
_SCENARIOS = LINE.branch(
    "all_scenarios",
    "Final RL over problems and general prompts, these judged by a preference reward model",
    Node("general_preferences", "contrast_replies", {"conversations": "general"}),
    Node("general_judge", "train_reward_model", {"checkpoint": "sft", "preferences": "general_preferences"}),
    Node(
        "scenarios_rl",
        "grpo",
        {
            **{"checkpoint": "sft", "problems": "generate_problems"},
            **{"general": "general", "reward_model": "general_judge"},
        },
    ),
    _EVALUATIONS["r1"],
    _evaluate("scenarios_rl", "scenarios_rl"),
    Node("report_scenarios", "report", {"evaluations": {"r1": "evaluate_r1", "all": "evaluate_scenarios_rl"}}),
)

# Reproductions of others' work begin at a published checkpoint: flows/recipes/reproductions.py has their figures.
_ZERO = Pipeline(
    "imported_zero",
    "Reinforcement learning straight from a published checkpoint on problems of our families",
    (
        Node("import_base", "import_checkpoint"),
        Node("puzzles", "generate_problems"),
        Node("evaluate_start", "evaluate", {"checkpoint": "import_base", "problems": "puzzles"}),
        Node("puzzle_rl", "grpo", {"checkpoint": "import_base", "problems": "puzzles"}),
        Node("evaluate_puzzle_rl", "evaluate", {"checkpoint": "puzzle_rl", "problems": "puzzles"}),
        Node("report_zero", "report", {"evaluations": {"start": "evaluate_start", "rl": "evaluate_puzzle_rl"}}),
    ),
)
_TRACES = Pipeline(
    "imported_traces",
    "A published checkpoint learns a data set of reasoning traces, and then by reinforcement on imported problems",
    (
        Node("import_base", "import_checkpoint"),
        Node("math", "import_problems"),
        Node("traces", "ingest_conversations", {"problems": "math"}),  # without the problems that judge
        Node("trace_sft", "sft", {"checkpoint": "import_base", "conversations": "traces"}),
        Node("evaluate_traces", "evaluate", {"checkpoint": "trace_sft", "problems": "math"}),
        Node("math_rl", "grpo", {"checkpoint": "trace_sft", "problems": "math"}),
        Node("evaluate_math_rl", "evaluate", {"checkpoint": "math_rl", "problems": "math"}),
        Node("report_traces", "report", {"evaluations": {"sft": "evaluate_traces", "rl": "evaluate_math_rl"}}),
    ),
)

_CORPUS = LINE.part("corpus", "Raw English, Chinese and code to packed tokens", ["tokenize"])

# What a release needs beyond R1: where it fails, its model card, and a gate before its tag.
_RELEASE = Pipeline(
    "release",
    "R1 with its probes, its model card, and its tag if it meets the recipe's requirements",
    (
        *LINE.part("", "", ["evaluate_r1"]).nodes,
        Node("probe_r1", "probe", {"checkpoint": "final_rl", "problems": "generate_problems"}),
        Node(
            "model_card_r1",
            "model_card",
            {"checkpoint": "final_rl", "reports": {"evaluation": "evaluate_r1", "probes": "probe_r1"}},
        ),
        Node("promote_r1", "promote", {"checkpoint": "final_rl", "reports": {"card": "model_card_r1"}}),
    ),
)

PIPELINES: dict[str, Pipeline] = {
    pipeline.name: pipeline
    for pipeline in (
        _CORPUS,
        Pipeline(
            "scaling",
            "Corpus to scaling laws: a ladder of small models and a held-out larger run",
            (*_CORPUS.nodes, Node("scaling_laws", "scaling_laws", {"tokens": "tokenize"})),
        ),
        Pipeline(
            "iterative",
            "Cold start, then GRPO in rounds with a reward model that learns on from the policy's replies",
            (*LINE.part("", "", ["evaluate_cold_start"]).nodes, *_rounds()),
        ),
        _RELEASE,
        LINE.part("base", "Corpus to the context-extended base model", ["evaluate_base"]),
        LINE.part("r1_zero", "Reinforcement learning straight from the base model", ["evaluate_r1_zero"]),
        LINE.part(
            "r1",
            "Cold start, reasoning RL, rejection sampling, SFT of the base, final RL",
            ["evaluate_cold_start", "evaluate_reasoning_rl", "evaluate_r1"],
        ),
        LINE.part(
            "distill",
            "R1's samples to Llama- and Qwen-shaped students, beside one trained by RL alone",
            ["evaluate_distill_llama", "evaluate_distill_qwen", "evaluate_rl_student_llama"],
        ),
        _EQUAL,
        _V3,
        _SCENARIOS,
        _ZERO,
        _TRACES,
        LINE,
    )
}


def pipeline(name: str) -> Pipeline:
    """The pipeline of that name; ConfigError names the nearest right one."""
    if name not in PIPELINES:
        raise ConfigError(f"no pipeline {name!r}; {nearest(name, PIPELINES)}")
    return PIPELINES[name]
