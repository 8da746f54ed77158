"""Reinforcement learning from verifiable rewards: group rollouts, rewards, GRPO's loss, engines, the learner."""
