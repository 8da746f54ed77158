"""A killed job continues to the same last bit."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infra.errors import StoreError
from stages.training.resume import ResumeStore
from stages.training.trainer import train
from stages.training.validation import Validation

PROGRAM = """
import pickle, sys
from pathlib import Path
from stages.training.trainer import train

folder = Path(sys.argv[1])
def report(done, total, unit, **metrics):
    print(done, flush=True)
result = train(pickle.loads((folder / "job.pickle").read_bytes()), report)
(folder / "result.pickle").write_bytes(pickle.dumps(result))
"""


def start(job, folder: Path) -> subprocess.Popen:
    """A process that trains `job` and prints each step it has done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_sigkill_at_a_random_step_changes_no_bit_of_losses_or_weights(make_job, micro_v3, tokens_dir, tmp_path):
    validation = Validation(str(tokens_dir), 32, windows=2, every=10)
    settings = {"steps": 24, "save_every": 4, "validation": validation, "options": {"seed": 3}}
    whole = make_job(micro_v3, "whole", **settings)
    torch.set_num_threads(1)
    expected = train(whole, lambda *args, **metrics: None)

    killed, folder = make_job(micro_v3, "killed", **settings), tmp_path / "killed"
    victim = random.randint(6, 20)
    process = start(killed, folder)
    for line in process.stdout:
        if int(line) >= victim:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL, f"the run ended before step {victim}"
    assert not Path(killed.out).exists()

    process = start(killed, folder)
    output = process.communicate()[0]
    assert process.returncode == 0
    assert int(output.split()[0]) > 1, "the second run started from the beginning"
    resumed = pickle.loads((folder / "result.pickle").read_bytes())
    timing = {"tokens_per_second"}
    strip = [
        [{k: v for k, v in row.items() if k not in timing} for row in result.progress.rows]
        for result in (expected, resumed)
    ]
    assert strip[0] == strip[1], f"killed at step {victim}"
    reference, tensors = (load_file(Path(job.out) / "model.safetensors") for job in (whole, killed))
    assert reference.keys() == tensors.keys()
    for name, tensor in reference.items():
        assert torch.equal(tensor, tensors[name]), f"{name}, killed at step {victim}"


def test_a_corrupt_newest_state_falls_back_to_the_one_before(tmp_path, caplog):
    store = ResumeStore(tmp_path)
    for step in (10, 20, 30):
        store.save(step, {"step": step, "weights": torch.full((4,), float(step))})
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["step-00000020.pt", "step-00000030.pt"]
    newest = tmp_path / "step-00000030.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert store.load()["step"] == 20
    assert "step-00000030.pt does not match its checksum" in caplog.text


def test_a_write_cut_short_does_not_count(tmp_path):
    store = ResumeStore(tmp_path)
    store.save(10, {"step": 10})
    (tmp_path / "step-00000020.pt").write_bytes(b"half")  # its seal was never written
    (tmp_path / "step-00000030.draft").write_bytes(b"less")
    assert store.load()["step"] == 10


def test_when_every_state_is_damaged_the_error_names_the_folder(tmp_path):
    store = ResumeStore(tmp_path)
    store.save(10, {"step": 10})
    seal = tmp_path / "step-00000010.json"
    seal.write_text(json.dumps(json.loads(seal.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(StoreError, match=r"every saved state in .* is damaged \(steps \[10\]\)"):
        store.load()


def test_an_empty_folder_has_no_state(tmp_path):
    assert ResumeStore(tmp_path / "new").load() is None


def test_a_resume_with_another_micro_batch_reads_on_where_the_last_one_stopped(make_job, micro_v3):
    whole = train(make_job(micro_v3, "whole"), lambda *args, **metrics: None)
    job = make_job(micro_v3, "moved", save_every=4)

    def stop(done: int, *args, **metrics) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job, stop)
    moved = replace(job, optimization=job.optimization.replace(micro_batch_size=2))
    resumed = train(moved, lambda *args, **metrics: None)
    losses = [[loss for _, loss in result.values("loss")] for result in (resumed, whole)]
    assert losses[0][:4] == losses[1][:4]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_a_finished_job_is_not_trained_again(make_job, micro_llama):
    job, steps = make_job(micro_llama, steps=3), []
    train(job, lambda done, *args, **metrics: steps.append(done))
    first = load_file(Path(job.out) / "model.safetensors")
    again = train(job, lambda done, *args, **metrics: steps.append(done))
    assert steps == [1, 2, 3]
    assert len(again.progress.rows) == 3
    for name, tensor in load_file(Path(job.out) / "model.safetensors").items():
        assert torch.equal(tensor, first[name])
