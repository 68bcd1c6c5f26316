"""The numerics on real weights, SmolLM2-135M-Instruct: skipped without `make real`.

The tiny model has 320 tokens in its vocabulary and short contexts; here they are 49,152 tokens and real text, so that
an error of rounding, of the shared prefix or of a cut support shows at its real size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import REPO, carry_out, small_config

from ogls.config import AdapterConfig, ModelConfig, Recipe, SamplingConfig
from ogls.distillation.steering import combine_states, steer_tokens
from ogls.models.continuation import run_continuations
from ogls.models.policy import Policy
from ogls.problems.prompts import Prompter
from ogls.records import Problem
from ogls.samplers.requests import build_requests
from ogls.samplers.transformers import TransformersSampler

FOLDER = REPO / "data/models/smollm2-135m"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER.exists(), reason="no real model: run `make real`")]

PROBLEM = "Ada has 12 apples. She gives 5 of them to a friend and buys 9 more. How many apples does she have now?"
EXEMPLARS = (
    "12 - 5 = 7 apples are left. 7 + 9 = 16. The answer is \\boxed{16}.",
    "She has 12 + 5 + 9 = 26 apples. \\boxed{26}",
    "First she gives 5 away: 12 - 5 = 7.\nThen she buys 9: 7 + 9 = 15.\n\\boxed{15}",
)
ROLLOUT = "Ada starts with 12 apples and gives 5 away, so she has 7. After buying 9 more she has 16.\n\\boxed{16}"
RECIPE = Recipe(base=1, correct=1, incorrect=-1)


@pytest.fixture(scope="module")
def real() -> Policy:
    return Policy(ModelConfig(path=str(FOLDER), device="cpu", dtype="float32"), AdapterConfig(rank=4))


@pytest.fixture(scope="module")
def contexts(real: Policy) -> list[list[int]]:
    """Prompts without an exemplar, and with each of three."""
    texts = [PROBLEM, *(f"{PROBLEM}\n\nHere is an attempt:\n\n{e}\n\nNow solve it yourself." for e in EXEMPLARS)]
    return [
        real.tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True)["input_ids"]
        for t in texts
    ]


@pytest.fixture(scope="module")
def rollout(real: Policy) -> list[int]:
    return [*real.tokenizer(ROLLOUT)["input_ids"], real.stop_ids[0]]


@pytest.fixture(scope="module")
def full(real: Policy, contexts: list[list[int]], rollout: list[int]) -> list[torch.Tensor]:
    """The logits [T, V] of the rollout after each context, from one full sequence each, by the model's own head."""
    with torch.inference_mode():
        return [real.model(input_ids=torch.tensor([c + rollout])).logits[0, len(c) - 1 : -1].float() for c in contexts]


@pytest.fixture(scope="module")
def states(real: Policy, contexts: list[list[int]], rollout: list[int]) -> list[torch.Tensor]:
    """The states [T, D] of the rollout after each context, from prefixes of different lengths in one batch."""
    with torch.inference_mode():
        return list(run_continuations(real, contexts, [(i, rollout) for i in range(len(contexts))], 4096))


def pools(states: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"base": states[0], "correct": (states[1] + states[3]) / 2, "incorrect": states[2]}


def test_a_shared_prefix_gives_the_states_of_full_sequences(
    real: Policy, states: list[torch.Tensor], full: list[torch.Tensor]
) -> None:
    for of_states, logits in zip(states, full, strict=True):
        assert (real.logits(of_states).log_softmax(-1) - logits.log_softmax(-1)).abs().max() < 1e-4


def test_the_target_of_states_is_the_target_of_full_logits(
    real: Policy, states: list[torch.Tensor], full: list[torch.Tensor]
) -> None:
    expected = (full[0] + (full[1] + full[3]) / 2 - full[2]).log_softmax(-1)
    found = real.logits(combine_states(pools(states), RECIPE)).log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).abs().max() < 1e-6  # nats per token


def test_fp16_states_move_a_target_by_less_than_a_thousandth_of_its_kl(
    real: Policy, states: list[torch.Tensor], rollout: list[int]
) -> None:
    ids = torch.tensor(rollout)
    exact = steer_tokens(pools(states), ids, RECIPE, real.head, 64)
    target = real.logits(combine_states(pools(states), RECIPE)).log_softmax(-1)
    halves = {pool: s.half() for pool, s in pools(states).items()}
    rounded = real.logits(combine_states(halves, RECIPE)).log_softmax(-1)
    error = (target.exp() * (target - rounded)).sum(-1).mean()
    assert exact.kl.mean() > 0.01
    assert error < 1e-3 * exact.kl.mean()


def test_64_tokens_hold_almost_all_of_a_target(real: Policy, states: list[torch.Tensor], rollout: list[int]) -> None:
    ids = torch.tensor(rollout)
    tails = {k: steer_tokens(pools(states), ids, RECIPE, real.head, k).tail_mass.mean() for k in (64, 512)}
    assert tails[64] < 0.05
    assert tails[512] < tails[64] / 2
    whole = steer_tokens(pools(states), ids[:2], RECIPE, real.head, len(real.head))
    assert whole.tail_mass.abs().max() < 1e-5


def test_sampled_log_probs_are_those_of_full_sequences_with_and_without_an_adapter(real: Policy) -> None:
    prompter = Prompter(real.tokenizer, small_config("unused").prompts)
    requests = build_requests([Problem("p", PROBLEM, "16")], prompter, 3, 0, "test")
    initial = real.initial_adapter()
    random = torch.Generator().manual_seed(0)
    moved = type(initial).from_weights(
        {n: w + 0.02 * torch.randn(w.shape, generator=random) for n, w in initial.weights.items()}
    )
    tokens = {}
    try:
        for name, adapter in (("base", None), ("moved", moved), ("base again", None)):
            real.use_adapter(adapter)
            completions = TransformersSampler(real).sample(requests, SamplingConfig(max_tokens=12))
            tokens[name] = [c.token_ids for c in completions]
            for request, c in zip(requests, completions, strict=True):
                sequence = torch.tensor([[*request.prompt_ids, *c.token_ids]])
                with torch.inference_mode():
                    logits = real.model(input_ids=sequence).logits[0, len(request.prompt_ids) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
                assert (expected - torch.tensor(c.logprobs)).abs().max() < 1e-4
    finally:
        real.use_adapter(None)
    assert tokens["base"] == tokens["base again"] != tokens["moved"]


def test_a_whole_round(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        f"model.path={FOLDER}",
        "adapter.rank=4",
        "problems.per_round=2",
        "rollout.max_tokens=8",
        "train.objective=sft",
        "evaluate.max_tokens=4",
    )
    run = carry_out(config, rounds=1)
    losses = [row["loss"] for row in run.records.read("updates", 1).to_pylist()]
    assert losses
    assert all(0 < loss < 20 for loss in losses)
    assert run.policy_hash(1) != "base"
