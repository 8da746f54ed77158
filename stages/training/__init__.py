"""What every training stage shares: schedules, losses, data, the per-worker loop and checkpoints.

Plain `torch.distributed` throughout: `torchrun` can start the loop where there is no Ray.
"""
