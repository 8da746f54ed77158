"""From reports to a release: the model card that is made of them, and the gate before a tag."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from flows.promotion import settle
from infra.artifact import Artifact, Manifest, Provenance, recipe_id
from infra.errors import ArtifactNotFound, ConfigError, InputError, PromotionRefused
from infra.settings import Settings
from infra.stage import run
from infra.store import ArtifactStore
from model.config import ModelConfig
from stages.evaluation.intervals import wilson
from stages.evaluation.measures import Measure, to_json
from stages.evaluation.plots import plot_intervals
from stages.model_card import ModelCardConfig, model_card
from stages.promote import PromoteConfig, decide, promote

SHAPE = ModelConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=2, d_ff=48, family="llama")
MEASURES = {
    "evaluation": {"pass_1": wilson(60, 100), "pass_1_en": wilson(40, 50), "pass_1_zh": wilson(20, 50)},
    "probes": {"chain_mixed": wilson(3, 50), "json_right": wilson(0, 50)},
}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A corpus, a checkpoint that read it, and two reports about the checkpoint, as the stages leave them."""
    store = ArtifactStore(tmp_path / "store")

    def commit(stage: str, kind: str, inputs: dict[str, str], files: dict[str, str], **summary: object) -> Artifact:
        made = Manifest(
            **{"id": recipe_id(stage, 1, {}, inputs), "kind": kind, "stage": stage, "stage_version": 1, "config": {}},
            **{"inputs": inputs, "summary": summary, "provenance": Provenance(wall_seconds=60.0), "files": ()},
            created=datetime.now(UTC),
        )
        with store.draft(made.id) as (out, _):
            for name, text in files.items():
                (out / name).write_text(text)
            if kind == "report":
                plot_intervals(out / "plot.png", ["a"], [(0.5, 0.4, 0.6)], "a")
            artifact = store.commit(out, made)
        store.tag(f"{stage}@latest", artifact.id)
        return artifact

    mixed = commit("mix", "documents", {}, {}, documents=10, bytes=1000, share_en_math=0.75, share_zh_math=0.25)
    files = {"model.json": SHAPE.model_dump_json()}
    about = {"steps": 5, "tokens": 12_345, "train_flops": 2e9}
    trained = commit("pretrain", "checkpoint", {"tokens": mixed.id}, files, **about)
    for stage, kind in (("evaluate", "evaluation"), ("probe", "probes")):
        measures = to_json({name: Measure.of(interval) for name, interval in MEASURES[kind].items()})
        report = {"kind": kind, "checkpoint": trained.id, "measures": measures}
        commit(stage, "report", {"checkpoint": trained.id}, {"report.json": json.dumps(report)})
    return store


REFS = {"checkpoint": "pretrain@latest", "reports.a": "evaluate@latest", "reports.b": "probe@latest"}


def test_the_card_says_what_lineage_and_reports_say_and_the_hub_can_read_it(store: ArtifactStore) -> None:
    config = ModelCardConfig(name="micro-r1", license="apache-2.0", description="A model for tests.")
    artifact = run(model_card, config, REFS, store, Settings()).artifact
    card = ModelCard.load(artifact.path / "README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en", "zh"])
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"pass_1": 0.6, "pass_1_en": 0.8, "pass_1_zh": 0.4, "chain_mixed": 0.06, "json_right": 0.0}
    text = card.content
    assert f"| parameters | {SHAPE.n_parameters():,} |" in text
    assert "| en_math | 75.0% |" in text
    assert "2e+09 FLOPs in all" in text
    assert "| 5 | 12,345 | 2e+09 | 60 s |" in text
    assert "It mixes languages in 6.0% (2.1% to 16.2%) of its chains of thought." in text
    assert "right result in 0.0% (0.0% to 7.1%) of the cases" in text
    assert "weakest at zh" in text
    assert f"tokens `{store.resolve('mix@latest')}`" in text  # the lineage goes past the inputs
    for plot in artifact.path.glob("*.png"):
        assert f"]({plot.name})" in text
    assert len(list(artifact.path.glob("*.png"))) == 2


def test_a_card_is_about_one_checkpoint_and_of_reports_alone(store: ArtifactStore, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(store.get("evaluate@latest").path, other)
    (other / "report.json").write_text(json.dumps({"kind": "evaluation", "checkpoint": "x", "measures": {}}))
    inputs = {"checkpoint": store.get("pretrain@latest"), "reports": (Artifact.local(other, "report"),)}
    with pytest.raises(InputError, match="is about x, not pretrain/"):
        model_card(ModelCardConfig(name="x", license="mit"), inputs, None)
    with pytest.raises(InputError, match="no measures"):
        model_card(ModelCardConfig(name="x", license="mit"), {**inputs, "reports": (store.get("mix@latest"),)}, None)


def test_a_requirement_is_held_against_the_end_of_the_interval_that_makes_it_harder() -> None:
    measures = {"pass_1": Measure(0.6, 0.5, 0.7), "bits": Measure(1.25)}
    held = {
        text: decide(text, measures) for text in ("pass_1 >= 0.5", "pass_1>=0.51", "pass_1 <= 0.7", "pass_1 <= 0.69")
    }
    assert [finding.holds for finding in held.values()] == [True, False, True, False]
    assert [finding.bound for finding in held.values()] == [0.5, 0.5, 0.7, 0.7]
    assert decide("bits <= 1.25", measures).holds
    with pytest.raises(InputError, match="did you mean 'pass_1'"):
        decide("pass_2 >= 0", measures)


@pytest.mark.parametrize("text", ["pass_1 > 0.5", "pass_1 >= half", ">= 0.5", "pass_1 >= 0.5 or so"])
def test_a_requirement_that_is_written_wrong_says_how_to_write_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r'write it as "pass_1 >= 0\.5"'):
        PromoteConfig.parse({"tag": "r1@released", "require": [text]})


def test_the_tag_is_set_only_if_every_requirement_holds_and_the_verdict_stays_with_it(store: ArtifactStore) -> None:
    wanted = ("pass_1 >= 0.5", "chain_mixed <= 0.2")
    passed = run(promote, PromoteConfig(tag="r1@released", require=wanted), REFS, store, Settings()).artifact
    settle(store, passed)
    assert store.resolve("r1@released") == store.resolve("pretrain@latest")
    assert store.resolve("r1@released.verdict") == passed.id
    assert passed.manifest.inputs["reports.b"] == store.resolve("probe@latest")
    store.untag("r1@released")

    refused = run(
        promote, PromoteConfig(tag="r1@released", require=("pass_1 >= 0.55",)), REFS, store, Settings()
    ).artifact
    with pytest.raises(PromotionRefused, match=r"pass_1 >= 0.55 fails: 0.502 of 0.600 \[0.502, 0.691\]") as told:
        settle(store, refused)
    assert told.value.exit_code == 9
    with pytest.raises(ArtifactNotFound):
        store.resolve("r1@released")
    assert "| pass_1 >= 0.55 |" in (refused.path / "report.md").read_text()  # refused, and on record


def test_a_model_card_can_stand_before_the_gate_for_all_its_reports(store: ArtifactStore) -> None:
    card = run(model_card, ModelCardConfig(name="x", license="mit"), REFS, store, Settings()).artifact
    refs = {"checkpoint": "pretrain@latest", "reports.card": card.id}
    config = PromoteConfig(tag="r1@released", require=("pass_1 >= 0.5", "chain_mixed <= 0.2"))
    assert run(promote, config, refs, store, Settings()).artifact.summary["promoted"]
    with pytest.raises(InputError, match="which another report has too"):
        run(promote, config, {**REFS, "reports.card": card.id}, store, Settings())
