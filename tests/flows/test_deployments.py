"""prefect.yaml, the flows' parameter forms, and what they publish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.actions import ArtifactCreate
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from toy import TOY, count, load, square, total

import stages
from flows import deployments, publish
from flows.pipeline_flows import pipeline_flow
from flows.pipelines import PIPELINES
from flows.publish import artifact_key, page
from flows.recipes import RECIPES
from flows.stages import stage_flow
from infra.errors import TamperedArtifact
from infra.store import ArtifactStore


def test_prefect_yaml_is_what_the_registry_says() -> None:
    assert deployments.FILE.read_text() == deployments.text(), "write it again: python -m flows.deployments"


def test_there_is_one_deployment_a_stage_and_one_a_pipeline_and_no_path_of_a_machine() -> None:
    text = deployments.FILE.read_text()
    entries = [d["entrypoint"].rpartition(".")[2] for d in yaml.safe_load(text)["deployments"]]
    assert entries == [*stages.NAMES, *PIPELINES]
    assert "/home" not in text
    assert "directory: /" not in text


def test_schedules_are_there_and_switched_off() -> None:
    found = [s for d in deployments.document()["deployments"] for s in d.get("schedules", [])]
    assert found
    assert not any(schedule["active"] for schedule in found)


@pytest.mark.parametrize("name", stages.NAMES)
def test_every_entrypoint_is_a_flow_with_a_form(name: str) -> None:
    from prefect.flows import load_flow_from_entrypoint

    schema = parameter_schema(load_flow_from_entrypoint(f"flows.stages.{name}")).model_dump()
    assert list(schema["properties"]) == ["config", "inputs", "force", "labels"]
    config = schema["definitions"][schema["properties"]["config"]["$ref"].rpartition("/")[2]]
    assert set(config["properties"]) == set(stages.load(name).config_type.model_fields)


def test_a_form_has_titles_choices_limits_and_nested_fields() -> None:
    schema = parameter_schema(stage_flow(count)).model_dump()
    config = schema["definitions"]["CountConfig"]["properties"]
    assert config["order"]["enum"] == ["up", "down"]
    assert config["seconds"] == {"default": 0.0, "minimum": 0, "title": "Seconds a row", "type": "number"}
    assert config["shape"]["$ref"] == "#/definitions/Shape"
    assert schema["definitions"]["Shape"]["properties"]["width"]["description"] == "Numbers a row"


def test_a_form_has_a_field_for_every_role_of_the_stage() -> None:
    inputs = parameter_schema(stage_flow(square)).definitions["SquareInputs"]
    assert inputs["required"] == ["numbers"]
    assert inputs["properties"]["numbers"]["description"] == "Id or tag of documents"
    assert list(inputs["properties"]) == ["numbers", "hint"]
    parts = parameter_schema(stage_flow(total)).definitions["SumInputs"]["properties"]["parts"]
    assert (parts["type"], parts["additionalProperties"]) == ("object", {"type": "string"})


def test_a_field_without_a_title_is_called_by_its_name() -> None:
    schema = parameter_schema(stage_flow(stages.load("ingest"))).model_dump()
    fields = schema["definitions"]["IngestConfig"]["properties"]
    assert fields["max_bytes"]["title"] == "Max bytes"
    titles = {field["title"] for model in schema["definitions"].values() for field in model["properties"].values()}
    assert not any("_" in title or title[0].islower() for title in titles)


def test_inputs_must_be_given_only_where_the_stage_takes_some() -> None:
    for name, needed in [("ingest", False), ("generate_problems", False), ("pretrain", True), ("evaluate", True)]:
        required = parameter_schema(stage_flow(stages.load(name))).model_dump().get("required", [])
        assert ("inputs" in required) == needed, name


def test_a_pipeline_form_offers_its_recipes_and_nodes() -> None:
    properties: dict[str, Any] = parameter_schema(pipeline_flow(TOY, load=load)).properties
    assert properties["recipe"]["enum"] == list(RECIPES)
    assert properties["until"]["anyOf"][0]["enum"] == ["small", "large", "squares", "cubes", "sums"]
    assert properties["overrides"]["type"] == "array"


def test_keys_are_what_prefect_takes() -> None:
    for text in ("train_tokenizer/0123456789ab", "rl_student_llama-progress", "Pipeline: R1"):
        assert ArtifactCreate(key=artifact_key(text), type="markdown", data="").key == artifact_key(text)


def test_a_page_has_metrics_lineage_with_links_and_plots(made_store: Path) -> None:
    store = ArtifactStore(made_store)
    cubes = store.get("cubes@latest")
    text = page(store, cubes, "cubes", "http://127.0.0.1:4280")
    assert "| largest | 1331 |" in text
    assert "```mermaid\ngraph LR" in text
    assert f'href "http://127.0.0.1:4280/artifact/{cubes.id}"' in text
    assert "|numbers|" in text
    assert "(data:image/png;base64,iVBOR" in text


def test_plots_that_would_swell_a_page_are_left_out(store_copy: Path) -> None:
    store = ArtifactStore(store_copy)
    cubes = store.get("cubes@latest")
    (cubes.path / "powers.png").write_bytes(bytes(400_000))
    assert "data:image" not in page(store, cubes, "cubes", "http://127.0.0.1:4280")


def test_what_the_api_or_another_artifact_lacks_does_not_fail_a_stage(
    made_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Callable[..., Any]:
        def raise_it(*_: Any, **__: Any) -> Any:
            raise error

        return raise_it

    store = ArtifactStore(made_store)
    monkeypatch.setattr(publish, "get_client", fail(ObjectNotFound(Exception("404"))))
    assert publish.create("markdown", "key", "text", "", None) is None
    cubes = store.get("cubes@latest")
    monkeypatch.setattr(publish, "lineage", fail(TamperedArtifact("another one")))
    publish.publish_page(store, cubes, "cubes", "http://127.0.0.1:4280", None)
    monkeypatch.setattr(publish, "lineage", fail(KeyError("a mistake of ours")))
    with pytest.raises(KeyError):
        publish.publish_page(store, cubes, "cubes", "http://127.0.0.1:4280", None)
