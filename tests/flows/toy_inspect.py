"""`toy_fathom`, and afterwards what Prefect's API knows about all runs so far, as JSON."""

import json

import toy_fathom  # noqa: F401  registers the toy line

from flows.cli import app

app(standalone_mode=False)

from prefect.client.orchestration import get_client  # noqa: E402  reads its settings when it is imported

with get_client(sync_client=True) as client:
    flows = {flow.id: flow.name for flow in client.read_flows()}
    runs = [(flows[run.flow_id], run.name, run.state.type.value, run.state.name) for run in client.read_flow_runs()]
    artifacts = [(found.type, found.key, found.data) for found in client.read_artifacts()]
print("INSPECTED" + json.dumps({"runs": runs, "artifacts": artifacts}))
