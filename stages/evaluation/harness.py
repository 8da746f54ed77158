"""Public benchmarks by lm-evaluation-harness: our model as one of its models, and a run of its tasks.

Every rank holds the model and its share of the requests; the harness gathers the answers. Importing this module needs
the extra `eval`.

Legend: B requests, T tokens, D width, N tokens that are scored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from infra.config import nearest
from infra.errors import ConfigError, InputError
from infra.metrics import Report
from model.generate import Generator
from stages.tokens.bpe import load_tokenizer
from stages.tokens.chat_template import render
from stages.training.checkpoint import load_model
from stages.training.distributed import Ranks, process_group

TOKENS_AT_ONCE = 16_384  # of a batch to be scored, padding included
KNOWN = {"do_sample", "until", "max_gen_toks", "temperature", "top_p"}  # what a task may say about sampling


@dataclasses.dataclass(frozen=True)
class HarnessJob:
    """Tasks under the harness's own names, and how to ask them."""

    checkpoint: str
    tasks: tuple[str, ...]
    tasks_dir: str | None
    few_shot: int | None
    limit: int | None
    chat: bool
    max_new_tokens: int
    run_unsafe_code: bool
    seed: int


class HarnessModel(TemplateLM):
    """A checkpoint as the harness wants a model. Texts begin with BOS, as in training; what does not fit the context
    loses its beginning, and `n_cut` counts how often."""

    def __init__(self, checkpoint: str, ranks: Ranks, max_new_tokens: int, seed: int, report: Report) -> None:
        super().__init__()
        self._rank, self._world_size, self._device = ranks.rank, ranks.world, ranks.device
        self._ranks, self._report, self._checkpoint = ranks, report, checkpoint
        self._model, self._words = load_model(checkpoint, str(ranks.device)), load_tokenizer(checkpoint)
        self._max_new_tokens, self._seed = max_new_tokens, seed
        self._marked = False  # texts are a chat template's output, in which marks mean their tokens
        self.max_length = self._model.config.max_position
        self.n_cut = 0

    # ---- text and tokens

    @property
    def eot_token_id(self) -> int:
        return self._words.eos

    @property
    def prefix_token_id(self) -> int:
        return self._words.eos if self._words.bos is None else self._words.bos

    @property
    def tokenizer_name(self) -> str:
        return self._checkpoint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._words.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text whose marks `tok_encode` reads; without a generation prompt, its last message is
        the beginning of the reply."""
        self._marked = True
        history, begun = (
            (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        )
        ids, _ = render(history, self._words, generation_prompt=True)
        return self._words.decode(ids, skip_special=False) + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self._words.encode_marked(string) if self._marked else self._words.encode(string)
        opening = [] if add_special_tokens is False else self._words.opening
        return ids if ids[: len(opening)] == opening else opening + ids

    # ---- scoring

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(Σ log p, whether it is the argmax throughout) of each continuation behind its context."""
        rows = []
        for _, context, continuation in requests:
            whole = context + continuation
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens exceeds the model's context ({self.max_length}): "
                    "leave the task out"
                )
            self.n_cut += len(whole) > self.max_length + 1
            rows.append((whole[-self.max_length - 1 :], len(continuation)))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        done = 0
        for batch in _batches([len(whole) for whole, _ in rows]):
            for number, score in zip(batch, self._score([rows[number] for number in batch]), strict=True):
                scores[number] = score
            done += len(batch)
            self._report(done, len(rows), "scored requests")
        return scores

    @torch.inference_mode()
    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of sequences and how many of their last tokens count."""
        inputs = [torch.tensor(whole[:-1], device=self._device) for whole, _ in rows]
        tokens_BT = pad_sequence(inputs, batch_first=True)  # behind the texts, where causal attention does not look
        hidden_BTD = self._model(tokens_BT).hidden_BTD
        scores = []
        for row, (whole, n_scored) in enumerate(rows):
            end = len(whole) - 1
            logits_NV = self._model.logits(hidden_BTD[row, end - n_scored : end])
            targets_N = torch.tensor(whole[-n_scored:], device=self._device)
            log_probs_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
            scores.append((float(log_probs_N.double().sum()), bool((logits_NV.argmax(-1) == targets_N).all())))
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each token scored once with as much before it as the context holds."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_prob
        return totals

    # ---- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies up to the EOS or the first of the task's stop strings, which is cut off."""
        replies = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        done = 0
        for group, numbers in enumerate(alike.values()):
            how = normalize_gen_kwargs(requests[numbers[0]].args[1], self._max_new_tokens)
            if unknown := how.keys() - KNOWN:
                raise InputError(
                    f"a task samples with {', '.join(sorted(unknown))}, which is not supported: leave it out"
                )
            texts = self._generate([requests[number].args[0] for number in numbers], how, group)
            for number, text in zip(numbers, texts, strict=True):
                replies[number] = text
            done += len(numbers)
            self._report(done, len(requests), "generated requests")
        return replies

    def _generate(self, prompts: Sequence[str], how: dict[str, Any], group: int) -> Iterator[str]:
        stops = [stop for stop in how["until"] if stop]
        near = 4 * max(map(len, stops), default=0) + 4  # tokens that can hold a stop string, one byte each

        def stopped(tokens: Sequence[int]) -> bool:
            tail = self._words.decode(tokens[-near:], skip_special=False)
            return any(stop in tail for stop in stops)

        longest = min(how["max_gen_toks"], self._max_new_tokens, self.max_length - 1)
        asked = [self.tok_encode(prompt) for prompt in prompts]
        room = self.max_length - longest
        self.n_cut += sum(len(ids) > room for ids in asked)
        seed = Random(f"{self._seed}/{group}/{self._rank}").getrandbits(62)
        completions = Generator(self._model).generate(
            [ids[-room:] for ids in asked],
            longest,
            temperature=how.get("temperature", 1.0) if how["do_sample"] else 0.0,
            top_p=how.get("top_p", 1.0),
            stop_ids=(self._words.eos,),
            generator=torch.Generator(self._device).manual_seed(seed),
            given_up=stopped if stops else None,
        )
        for completion in completions:
            text = self._words.decode(completion.tokens[:-1] if completion.finished else completion.tokens, False)
            yield text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    # ---- what the harness asks of several ranks

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        parts = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst)
        return parts

    def barrier(self) -> None:
        self._ranks.barrier()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of requests, longest first (what does not fit the memory fails at once), TOKENS_AT_ONCE together."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _tasks(job: HarnessJob) -> TaskManager:
    """What the harness knows; where the folder has all that is asked for, that alone: its own index takes seconds."""
    if job.tasks_dir is None:
        return TaskManager()
    own = TaskManager(include_path=".", include_defaults=False)
    return own if set(job.tasks) <= set(own.all_subtasks) else TaskManager(include_path=".")


def _check_code(job: HarnessJob, name: str, unsafe: bool) -> None:
    if unsafe and not job.run_unsafe_code:
        raise ConfigError(
            f"tasks: {name} runs programs that the model wrote, in the harness and outside our sandbox; "
            "set run_unsafe_code if this machine may be lost"
        )


def run_harness(job: HarnessJob, report: Report) -> dict[str, Any] | None:
    """The harness's results, with its samples, on rank 0. InputError for data that is not there."""
    with process_group() as ranks, contextlib.chdir(job.tasks_dir or "."):
        manager = _tasks(job)
        for name in job.tasks:
            if name not in manager.task_index:
                raise ConfigError(f"tasks: the harness has no {name!r}; {nearest(name, manager.all_tasks)}")
            # Before it is loaded: humaneval runs a program then.
            _check_code(job, name, (manager.task_index[name].cfg or {}).get("unsafe_code", False))
        if job.run_unsafe_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric's own question
        try:
            loaded = manager.load(list(job.tasks))
        except OSError as error:  # what the hub's client and the loaders of files raise alike
            told = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"tasks: data of {', '.join(job.tasks)} cannot be read ({told}); see tasks_dir") from None
        for name, task in loaded["tasks"].items():
            _check_code(job, name, getattr(task, "UNSAFE_CODE", False))
            if job.few_shot is not None and task.get_config("num_fewshot") != 0:  # 0 is a task's own decision
                task.set_config(key="num_fewshot", value=job.few_shot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=job.seed)
        model = HarnessModel(job.checkpoint, ranks, job.max_new_tokens, job.seed, report)
        results = evaluate(
            lm=model,
            task_dict=loaded,
            limit=job.limit,
            bootstrap_iters=0,
            apply_chat_template=job.chat,
            fewshot_as_multiturn=job.chat,
            confirm_run_unsafe_code=job.run_unsafe_code,
        )
        cut = int(ranks.all_reduce(torch.tensor(model.n_cut, device=ranks.device)))
        return None if results is None else {**results, "cut": cut}
