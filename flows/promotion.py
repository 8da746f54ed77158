"""What follows from the verdict of the stage promote: the tag, or a refusal that ends the run."""

from __future__ import annotations

from infra.artifact import Artifact
from infra.errors import PromotionRefused
from infra.store import ArtifactStore


def settle(store: ArtifactStore, artifact: Artifact) -> None:
    """Give a promoted checkpoint its tag, and the verdict one beside it, so that it is kept as long as the tag stands.

    Raises PromotionRefused with the requirements that failed. Artifacts of other stages are none of its business.
    """
    if artifact.manifest.stage != "promote":
        return
    tag, checkpoint = artifact.config["tag"], artifact.manifest.inputs["checkpoint"]
    if not artifact.summary["promoted"]:
        raise PromotionRefused(f"{checkpoint} does not become {tag}: {artifact.summary['failed']} ({artifact.id})")
    store.tag(f"{tag}.verdict", artifact.id)
    store.tag(tag, checkpoint)
