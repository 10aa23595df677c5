"""The oracle against transformers, and its parts against plain computations of their own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, random_weights
from torch import Tensor

from jobs.architecture import ModelArchitecture
from jobs.tensors import tensors
from models.huggingface import source, write
from models.reference import Context, Decoder, MoE, Router, positions_of
from models.weights import whole

TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def decoder(model: ModelArchitecture, weights: dict[str, Tensor]) -> Decoder:
    made = Decoder(model).to(next(iter(weights.values())).dtype)
    made.load_state_dict(weights)
    return made.eval()


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model, weights = FAMILIES[family], random_weights(FAMILIES[family], dtype)
    list(write(tmp_path, model, weights.__getitem__, dtype, sequence_length=16))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", **_EAGER)
    assert (theirs.config.model_type, theirs.dtype) == (family, dtype)
    assert error(theirs(TOKENS).logits, decoder(model, weights)(TOKENS).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_transformers_writes_is_read(tmp_path: Path, family: str) -> None:
    model, weights = FAMILIES[family], random_weights(FAMILIES[family])
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    list(write(ours, model, weights.__getitem__, torch.float32, sequence_length=16))
    kind = transformers.AutoModelForCausalLM.from_pretrained(ours, **_EAGER)
    kind.save_pretrained(theirs)  # a config and names of its own
    read = source(str(theirs), model)
    for name, shape in tensors(model).items():
        assert torch.equal(read(whole(name, torch.empty(shape))), weights[name]), name


MOE = FAMILIES["mixtral"]


def routed(model: ModelArchitecture, hidden: Tensor, groups: Tensor | None = None) -> tuple[Router, Tensor, Tensor]:
    """A router with weights, and the (experts, weights) that it gives."""
    router = Router(model)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    routing = router(hidden, groups)
    return router, routing.experts, routing.weights.detach()


HIDDEN = torch.randn(3, 8, MOE.hidden, generator=torch.Generator().manual_seed(4))


def test_the_balancing_loss_and_the_z_loss() -> None:
    model = MOE.model_copy(update={"aux_loss": 0.3, "z_loss": 0.07})
    router, experts, _ = routed(model, HIDDEN)
    balance, square, tokens = 0.0, 0.0, HIDDEN.shape[0] * HIDDEN.shape[1]
    for row in range(len(HIDDEN)):
        share, mean = [0.0] * model.experts, [0.0] * model.experts
        for at, token in enumerate(HIDDEN[row]):
            logits = [float(token @ weight) for weight in router.weight.detach()]
            total = sum(math.exp(logit) for logit in logits)
            square += math.log(total) ** 2
            for expert in range(model.experts):
                mean[expert] += math.exp(logits[expert]) / total / HIDDEN.shape[1]
                share[expert] += float(expert in experts[row, at]) / (HIDDEN.shape[1] * model.top_k)
        balance += model.experts * sum(f * p for f, p in zip(share, mean, strict=True)) / len(HIDDEN)
    expected = 0.3 * balance + 0.07 * square / tokens
    assert router(HIDDEN, None).auxiliary.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("grouped", [False, True], ids=["all tokens", "two groups"])
@pytest.mark.parametrize("order", ["probs", "position"])
def test_an_expert_takes_no_more_than_its_capacity(order: str, grouped: bool) -> None:
    dropless = MOE.model_copy(update={"capacity_factor": 0.0})
    model = MOE.model_copy(update={"capacity_factor": 0.7, "drop_order": order})
    groups = torch.arange(3)[:, None].expand(3, 8) % 2 if grouped else torch.zeros(3, 8, dtype=torch.int64)
    _, experts, weights = routed(dropless, HIDDEN)
    expected = torch.zeros_like(weights)
    for group in range(2 if grouped else 1):
        rows = [row for row in range(3) if int(groups[row, 0]) == group]
        capacity = math.ceil(len(rows) * 8 * model.top_k / model.experts * 0.7)
        for expert in range(model.experts):
            asking = [
                (at, row, choice)
                for at in range(8)
                for row in rows
                for choice in range(model.top_k)
                if int(experts[row, at, choice]) == expert
            ]
            if order == "probs":
                asking.sort(key=lambda one: -float(weights[one[1], one[0], one[2]]))
            for at, row, choice in asking[:capacity]:
                expected[row, at, choice] = weights[row, at, choice]
    _, chosen, found = routed(model, HIDDEN, groups if grouped else None)
    assert torch.equal(chosen, experts)
    assert torch.equal(found, expected)
    assert 0 < int((found == 0).sum()) < found.numel() / 2


def test_a_dropped_choice_adds_nothing() -> None:
    """Experts see only what they keep: the layer's output is the sum over kept choices alone."""
    model = MOE.model_copy(update={"capacity_factor": 0.5})
    moe = MoE(model)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found, _ = moe(HIDDEN, Context(torch.zeros(3, 8, dtype=torch.int64)))
        routing = moe.router(HIDDEN, None)
        expected = torch.zeros_like(HIDDEN)
        for row, at, choice in (routing.weights > 0).nonzero().tolist():
            expert = moe.experts[int(routing.experts[row, at, choice])]
            expected[row, at] += routing.weights[row, at, choice] * expert(HIDDEN[row, at])
    torch.testing.assert_close(found, expected)


def test_sigmoid_scores_and_their_scale() -> None:
    model = MOE.model_copy(update={"router_score": "sigmoid", "router_scale": 2.5})
    router, experts, weights = routed(model, HIDDEN)
    for row, at in ((0, 0), (2, 7)):
        scores = [1 / (1 + math.exp(-float(HIDDEN[row, at] @ weight))) for weight in router.weight.detach()]
        best = sorted(range(model.experts), key=lambda expert: -scores[expert])[: model.top_k]
        assert experts[row, at].tolist() == best
        total = sum(scores[expert] for expert in best)
        assert weights[row, at].tolist() == pytest.approx([2.5 * scores[expert] / total for expert in best], rel=1e-5)


def test_a_bias_moves_the_choice_towards_idle_experts_and_not_the_weights() -> None:
    model = MOE.model_copy(update={"router_score": "sigmoid", "router_bias": True, "router_bias_rate": 0.25})
    router, experts, _ = routed(model, HIDDEN)
    counts = [int((experts == expert).sum()) for expert in range(model.experts)]
    mean = sum(counts) / model.experts
    router.update_bias()
    assert router.bias.tolist() == [0.25 * ((count < mean) - (count > mean)) for count in counts]
    assert router.load.tolist() == [0] * model.experts
    router.bias.copy_(torch.tensor([9.0, 9.0, 9.0] + [0.0] * 5))  # decides alone
    routing = router(HIDDEN, None)
    assert {tuple(sorted(chosen)) for chosen in routing.experts.flatten(0, 1).tolist()} == {(0, 1, 2)}
    scores = (HIDDEN @ router.weight.T).sigmoid().gather(-1, routing.experts)
    torch.testing.assert_close(routing.weights, scores / scores.sum(-1, keepdim=True))
    assert router.load.tolist() == [24, 24, 24, 0, 0, 0, 0, 0]
    router.eval()
    router(HIDDEN, None)
    assert router.load.sum() == 72  # validation does not count


def test_positions_begin_again_with_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 4], [7, 7, 7, 7, 7, 7]])
    assert positions_of(documents, documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert positions_of(documents, None).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe"])
def test_documents_in_one_row_are_computed_as_if_alone(family: str) -> None:
    model = FAMILIES[family]
    made = decoder(model, random_weights(model))
    packed = made(TOKENS[:1], torch.tensor([[0] * 5 + [1] * 7])).logits
    alone = torch.cat([made(TOKENS[:1, :5]).logits, made(TOKENS[:1, 5:]).logits], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert error(made(TOKENS[:1]).logits[:, 5:], alone[:, 5:]) > 0.1  # what a missing mask would look like


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_has_the_tensors_of_the_model(family: str) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in Decoder(FAMILIES[family]).state_dict().items()}
    assert found == tensors(FAMILIES[family])
    biased = FAMILIES["mixtral"].model_copy(update={"router_bias": True})
    assert {name: tuple(tensor.shape) for name, tensor in Decoder(biased).state_dict().items()} == tensors(biased)
