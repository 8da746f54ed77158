"""Scaling laws as DeepSeek LLM (2401.02954, section 3) finds them: shapes, points, the fits and what they rest on.

C is a run's compute in non-embedding FLOPs, M a model's non-embedding FLOPs per token, D the tokens it reads; C = M·D.
"""
