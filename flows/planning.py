"""What a pipeline run would do, and why, from ids alone: nothing is run.

The id of a stage run is the hash of its recipe, so every node's id follows from its config and its inputs' ids before
anything exists. A node is reused if the store has its id, and otherwise the difference to the nearest artifact of the
same stage says why it must run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import stages
from flows.pipelines import Load, Node, Pipeline
from flows.recipes import Recipe
from infra.artifact import Manifest
from infra.config import Config
from infra.errors import ArtifactNotFound, ConfigError, FathomError, TamperedArtifact
from infra.stage import Stage
from infra.store import ArtifactStore, Fault, differences
from model.config import ModelConfig

State = Literal["reuse", "run", "blocked"]


@dataclass(frozen=True)
class Selection:
    """Which part of a pipeline to run. `from_` and `only` execute again what exists; what they need must exist."""

    from_: str | None = None
    until: str | None = None
    only: str | None = None
    force: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.only and (self.from_ or self.until or self.force):
            raise ConfigError("--only runs one node by itself: leave out --from, --until and --force")

    def nodes(self, pipeline: Pipeline) -> tuple[set[str], set[str]]:
        """(nodes to see to, those of them to execute even if they exist)."""
        if self.only:
            only = {pipeline.node(self.only).name}
            return only, only
        chosen = pipeline.upstream([self.until]) if self.until else set(pipeline.by_name)
        if self.from_:
            again = pipeline.downstream(self.from_) & chosen
            if not again:
                raise ConfigError(f"--from {self.from_} --until {self.until}: {self.until} does not need {self.from_}")
            chosen = again
        else:
            again = set()
        forced = {pipeline.node(name).name for name in self.force}
        if forced - chosen:
            raise ConfigError(
                f"--force {', '.join(sorted(forced - chosen))}: not in the part of the line that was chosen"
            )
        return chosen, again | forced


@runtime_checkable
class BuildsModel(Protocol):
    """A config that says which model it trains, and on how much: pretrain's."""

    sequence_length: int

    def trained_model(self, vocab_size: int) -> ModelConfig: ...

    def n_tokens(self) -> int: ...


@dataclass(frozen=True)
class Counts:
    """Size and cost of a model that a node trains from random weights, from its config alone."""

    parameters: int  # all that is trained, MTP modules included
    mtp_parameters: int
    active_parameters: int  # read by one token's forward pass, without MTP
    embedding_parameters: int  # the vocabulary's, head included
    training_tokens: int
    training_flops_per_token: int
    training_flops: int
    cache_bytes_per_token: int  # in BF16

    @classmethod
    def of(cls, config: BuildsModel, vocab_size: int) -> Counts:
        model, tokens = config.trained_model(vocab_size), config.n_tokens()
        flops = model.flops_per_token(config.sequence_length, mtp=True)
        return cls(
            parameters=model.n_parameters(),
            mtp_parameters=model.n_mtp_parameters(),
            active_parameters=model.n_active_parameters(),
            embedding_parameters=model.n_embedding_parameters(),
            training_tokens=tokens,
            training_flops_per_token=flops,
            training_flops=flops * tokens,
            cache_bytes_per_token=int(model.cache_bytes_per_token()),
        )


@dataclass(frozen=True)
class Step:
    """One node of a plan: what it would make, and whether it has to run. `force` executes it although it exists."""

    node: Node
    stage: Stage
    config: Config
    refs: dict[str, str]
    id: str
    state: State
    why: tuple[str, ...]
    force: bool = False
    chosen: bool = True
    problem: FathomError | None = None
    counts: Counts | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "node": self.node.name,
            "stage": self.stage.name,
            "id": self.id,
            "state": self.state,
            "why": list(self.why),
            "force": self.force,
            "inputs": self.refs,
            "config": self.config.model_dump(mode="json"),
            "model": asdict(self.counts) if self.counts else None,
        }


@dataclass(frozen=True)
class Plan:
    """Steps in running order."""

    pipeline: Pipeline
    recipe: str
    steps: tuple[Step, ...]

    @property
    def problem(self) -> FathomError | None:
        """The first thing that keeps the plan from being run."""
        return next((step.problem for step in self.steps if step.problem), None)

    def __getitem__(self, name: str) -> Step:
        return next(step for step in self.steps if step.node.name == name)


@dataclass
class _Planner:
    pipeline: Pipeline
    recipe: Recipe
    store: ArtifactStore
    load: Load
    settings: tuple[str, ...] = ()
    by_stage: dict[str, list[Manifest]] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for artifact_id in self.store.ids():
            try:
                manifest = self.store.manifest(artifact_id)
            except TamperedArtifact:
                continue  # verify says so where it matters
            self.by_stage.setdefault(manifest.stage, []).append(manifest)


def plan(
    pipeline: Pipeline,
    recipe: Recipe,
    store: ArtifactStore,
    settings: Iterable[str] = (),
    selection: Selection | None = None,
    load: Load = stages.load,
) -> Plan:
    """Work out every chosen node's id, whether it is reused, runs or is blocked, and why."""
    settings, selection = tuple(settings), selection or Selection()
    configs = recipe.resolve(pipeline, settings, load)
    chosen, again = selection.nodes(pipeline)
    pinned = {name: pin for name, pin in recipe.pins.items() if name in pipeline.by_name}
    _refuse_pinned(recipe, pinned, selection)
    needed = {source for name in chosen - set(pinned) for source in pipeline.node(name).roles.values()}
    planner = _Planner(pipeline, recipe, store, load, settings)
    for node in pipeline.nodes:
        stage = load(node.stage)
        refs = {role: planner.steps[source].id for role, source in node.roles.items()}
        stage.check_roles(refs)
        name = node.name
        if name in pinned:
            step = _pinned(planner, node, stage, configs[name], refs, pinned[name])
        else:
            step = _step(planner, node, stage, configs[name], refs, name in chosen, name in again)
            step = replace(step, counts=_counts(planner, step))
        planner.steps[name] = step
    shown = tuple(step for name, step in planner.steps.items() if name in chosen | needed)
    return Plan(pipeline, recipe.name, shown)


def _refuse_pinned(recipe: Recipe, pinned: Mapping[str, str], selection: Selection) -> None:
    """A pinned node is never executed, so to ask for it is a mistake."""
    asked = [("--only", selection.only), ("--from", selection.from_), *(("--force", name) for name in selection.force)]
    for option, name in asked:
        if name is not None and name in pinned:
            raise ConfigError(
                f"{option} {name}: recipe {recipe.name} pins {name} to {pinned[name]}, so it is never executed"
            )


def _pinned(planner: _Planner, node: Node, stage: Stage, config: Config, refs: dict[str, str], pin: str) -> Step:
    try:
        manifest = planner.store.manifest(planner.store.resolve(pin))
    except ArtifactNotFound as error:
        problem: FathomError = ArtifactNotFound(f"recipe {planner.recipe.name} pins {node.name} to {pin}: {error}")
        return Step(node, stage, config, refs, pin, "blocked", (f"pinned to {pin}, which is missing",), problem=problem)
    if manifest.kind != stage.makes:
        problem = ConfigError(f"{node.name} is pinned to {pin}, a {manifest.kind}; it makes a {stage.makes}")
        return Step(node, stage, config, refs, manifest.id, "blocked", (str(problem),), problem=problem)
    return Step(node, stage, config, dict(manifest.inputs), manifest.id, "reuse", (f"pinned to {pin}",), chosen=False)


def _step(
    planner: _Planner, node: Node, stage: Stage, config: Config, refs: dict[str, str], chosen: bool, again: bool
) -> Step:
    artifact_id = stage.id(config, refs)
    sources = {role: planner.steps[source] for role, source in node.roles.items()}

    def step(state: State, *why: str, force: bool = False, problem: FathomError | None = None) -> Step:
        return Step(node, stage, config, refs, artifact_id, state, why, force, chosen, problem)

    if chosen:
        blocked = [f"needs {step.node.name}" for step in sources.values() if step.state == "blocked"]
        if blocked:
            return step("blocked", *blocked)
        missing = [s for s in sources.values() if not s.chosen and s.state == "run"]
        if missing:
            return step("blocked", *(f"needs {s.node.name}" for s in missing), problem=_missing(planner, missing[0]))
        if again:
            return step("run", "asked for", force=True)
    if not planner.store.exists(artifact_id):
        return step("run", *_why(planner, node, stage, config, sources))
    faults = planner.store.verify(artifact_id) if chosen else []
    if faults and rebuilt(faults):
        return step(
            "run", *(f"input {fault.path} was rebuilt since with a different content" for fault in faults), force=True
        )
    if faults:
        text = f"tampered: {faults[0].path}: {faults[0].problem}"
        problem = TamperedArtifact(f"{node.name} ({artifact_id}) {text}; make it again with --force {node.name}")
        return step("blocked", text, problem=problem)
    manifest = planner.store.manifest(artifact_id)
    drifted = manifest.provenance.source_digest != stage.source_digest
    return step("reuse", *(["code drifted since (reused)"] if drifted else []))


def rebuilt(faults: Iterable[Fault]) -> bool:
    """Whether an artifact's own files are whole and only what it was made from has changed under the same id."""
    return all("was rebuilt since" in fault.problem for fault in faults)


def _counts(planner: _Planner, step: Step) -> Counts | None:
    """Counts of a node that builds a model, with the vocabulary of the tokenizer upstream of it."""
    if not isinstance(step.config, BuildsModel):
        return None
    upstream = planner.pipeline.upstream(step.node.roles.values())
    tokenizer = next(made for name in upstream if (made := planner.steps[name]).stage.makes == "tokenizer")
    if tokenizer.state == "reuse":
        return Counts.of(step.config, planner.store.manifest(tokenizer.id).summary["vocab_size"])
    return Counts.of(step.config, tokenizer.config.vocab_size)


def _missing(planner: _Planner, step: Step) -> ArtifactNotFound:
    name, pipeline = step.node.name, planner.pipeline.name
    settings = "".join(f" --set {shlex.quote(setting)}" for setting in planner.settings)
    command = f"fathom run {pipeline} --recipe {planner.recipe.name}{settings} --until {name}"
    return ArtifactNotFound(f"upstream {name} ({step.id}) is not in the store; make it with: {command}")


def _why(planner: _Planner, node: Node, stage: Stage, config: Config, sources: Mapping[str, Step]) -> list[str]:
    """How the run differs from the artifact of the same stage that it differs from least."""
    refs = {role: source.id for role, source in sources.items()}
    external = stage.external(config)
    candidates = planner.by_stage.get(stage.name, [])
    if not candidates:
        return ["never made"]
    values = config.model_dump(mode="json")

    def distance(manifest: Manifest) -> tuple[int, bool, float]:
        found = differences(manifest.config, values) + differences(manifest.inputs, refs)
        found += differences(manifest.external, external)
        other_node = manifest.provenance.labels.get("node") != node.name
        return len(found) + (manifest.stage_version != stage.version), other_node, -manifest.created.timestamp()

    nearest = min(candidates, key=distance)
    why = []
    if nearest.stage_version != stage.version:
        why.append(f"stage version {nearest.stage_version} → {stage.version}")
    why += [f"{path}: {_short(old)} → {_short(new)}" for path, old, new in differences(nearest.config, values)]
    why += [f"{name}: {_short(old)} → {_short(new)}" for name, old, new in differences(nearest.external, external)]
    for role, old, new in differences(nearest.inputs, refs):
        if new is not None and sources[role].state == "run":
            why.append(f"input {role} will change ({sources[role].node.name} runs)")
        else:
            why.append(f"input {role}: {old or 'none'} → {new or 'none'}")
    return why


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"
