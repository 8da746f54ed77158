"""States on disk: what is saved comes back, and what is damaged does not."""

import copy
import errno
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infra.errors import StoreError
from stages.training import resume
from stages.training.resume import ResumeStore, Retention
from stages.training.trainer import train


def saved(directory: Path, *steps: int, retention: Retention | None = None) -> ResumeStore:
    """A store that has published the state {"step": step, "weights": …} of each step."""
    with ResumeStore(directory, retention) as store:
        for step in steps:
            store.save(step, {"step": step, "weights": torch.full((4,), float(step))})
    return store


def test_a_state_comes_back_as_it_was_when_it_was_saved(tmp_path):
    weights = torch.arange(6.0).view(2, 3)
    state = {
        "model": {"w": weights, "half": torch.randn(3).bfloat16(), "none": torch.zeros(0, 0)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "param_groups": [{"betas": (0.9, 0.95)}]},
        "rows": [{"loss": float("nan")}, {"load": [[1, 2]]}],
        "average": None,
    }
    expected = copy.deepcopy(state)
    with ResumeStore(tmp_path) as store:
        store.save(1, state)
        weights += 1  # training goes on while the state is written
        state["rows"].append({})
    torch.testing.assert_close(store.load(), expected, rtol=0, atol=0, equal_nan=True)


def test_what_stays_is_the_newest_few_and_every_nth(tmp_path):
    assert saved(tmp_path / "few", 10, 20, 30).steps() == [20, 30]
    kept = saved(tmp_path / "nth", *range(10, 70, 10), retention=Retention(newest=1, every=20))
    assert kept.steps() == [20, 40, 60]
    assert [path.name for path in (tmp_path / "few").glob("*.*")] == []


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "seal.json"])
@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, caplog, name, damage):
    store = saved(tmp_path, 10, 20)
    victim = tmp_path / "step-00000020" / name
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.unlink()
    if damage != "missing":
        victim.write_bytes(data if damage == "flipped" else data[:-1])
    assert store.load()["step"] == 10
    assert "step-00000020 does not match its seal; trying the state before it" in caplog.text
    assert saved(tmp_path, 20).load()["step"] == 20  # done again, it takes the damaged one's place


def test_when_every_state_is_damaged_the_error_names_the_folder(tmp_path):
    store = saved(tmp_path, 10)
    (tmp_path / "step-00000010" / "seal.json").unlink()
    with pytest.raises(StoreError, match=r"every saved state in .* is damaged \(steps \[10\]\)"):
        store.load()


def test_a_write_cut_short_does_not_count_and_is_cleared_away(tmp_path):
    saved(tmp_path, 10)
    for left in ("step-00000020.draft", "step-00000005.gone"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "__0_0.distcp").write_bytes(b"half")
    assert ResumeStore(tmp_path).load()["step"] == 10
    saved(tmp_path, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


def test_a_save_that_fails_in_the_background_is_raised_by_the_next_one_and_by_the_end(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saved(tmp_path, 10)
    monkeypatch.setattr(resume._Hashing, "write", full)
    store = ResumeStore(tmp_path)
    store.save(20, {"step": 20})
    with pytest.raises(OSError, match="No space left") as raised:
        store.save(30, {"step": 30})
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"), ResumeStore(tmp_path) as store:
        store.save(20, {"step": 20})
    assert store.load()["step"] == 10


def test_a_full_disk_is_told_as_such_and_leaves_the_state_before(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        saved(disk, 1)
        with pytest.raises(OSError, match="No space left") as raised, ResumeStore(disk) as store:
            store.save(2, {"weights": torch.zeros(1 << 18)})
        assert raised.value.errno == errno.ENOSPC  # which a stage turns into its StoreError
        assert store.load()["step"] == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_bytes_that_read_back_otherwise_are_no_state(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "_sha256", lambda path: "0" * 64)
    with pytest.raises(StoreError, match="reads back other bytes than were written"), ResumeStore(tmp_path) as store:
        store.save(1, {"step": 1})
    assert store.steps() == []


def test_ranks_share_the_writing_and_any_number_of_them_may_read(tmp_path, run_ranks):
    """Two ranks: what both hold is written once, what is sharded by each its part; one process reads it all."""
    run_ranks(
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        from stages.training.distributed import process_group
        from stages.training.resume import ResumeStore

        with process_group() as ranks, ResumeStore(folder) as store:
            both = {str(n): torch.full((1000,), float(n)) for n in range(4)}
            mesh = init_device_mesh("cpu", (2,))
            sharded = distribute_tensor(torch.arange(10.0).view(5, 2), mesh, [Shard(0)])
            for step in (1, 2):
                store.save(step, {"both": both, "sharded": sharded, "step": step})
                dist.all_reduce(torch.ones(1))  # training goes on
        """,
        folder=tmp_path,
    )
    files = sorted((tmp_path / "step-00000002").glob("*.distcp"))
    assert len(files) == 2
    assert all(path.stat().st_size < 0.8 * sum(other.stat().st_size for other in files) for path in files)
    state = ResumeStore(tmp_path).load()
    assert state["step"] == 2
    assert torch.equal(state["sharded"], torch.arange(10.0).view(5, 2))
    assert all(torch.equal(state["both"][str(n)], torch.full((1000,), float(n))) for n in range(4))


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
