"""Training: what a hash function can learn and a token table cannot, what the loss looks at, which epoch is kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from predictor.accuracy import Accuracy
from predictor.calibration import inclusion
from predictor.checkpoint import Checkpoint
from predictor.hash_function import HashFunction, LSTMPredictor
from predictor.hash_table import Width
from predictor.settings import TrainSettings
from predictor.token_table import TokenTable
from predictor.tokens import DECODER, ENCODER, RoutingShape, TokenBatch
from predictor.traces import LayerTrace, Trace, select
from predictor.training import LSTMLearner, calibrate, distillation_loss, evaluate, fit, layer_loss, split
from tests.predictor.made_traces import ragged, random_trace, trace_by_rule

VOCAB, EXPERTS = 24, 6
SHAPE = RoutingShape(experts=(EXPERTS, EXPERTS), streams=(ENCODER, ENCODER), top_k=1, vocab_size=VOCAB)
BY_ITSELF, BY_THE_ONE_BEFORE = 0, 1
"""MoE layers: the expert is a function of the token id; of the token id before it."""


def halves(trace: Trace) -> tuple[Trace, Trace]:
    rows, chosen_by, judged_by = split(trace.tokens, 0.2, seed=0)
    return select(trace, rows, SHAPE), select(trace, np.concatenate([chosen_by, judged_by]), SHAPE)


def train(training, held_out, settings, embedding, seed=0, **options) -> tuple[HashFunction, Accuracy]:
    """The network, and how good it is on `held_out`."""
    learner = LSTMLearner(SHAPE, embedding, settings, seed)
    fit(learner, training, held_out, SHAPE, settings, seed, **options)
    return learner.network, evaluate(learner.predictor(), held_out, SHAPE)


@pytest.fixture(scope="module")
def world():
    """A trace by rule, in two parts, the embeddings, and per MoE layer the scaling factor by token id."""
    rng = np.random.default_rng(0)
    expert_of = rng.permutation(np.arange(VOCAB) % EXPERTS)
    weights = [rng.uniform(0.2, 0.9, VOCAB) for _ in range(SHAPE.layers)]
    tokens = ragged(rng, rows=300, vocab=VOCAB, shortest=5, longest=12)
    rules = [lambda row: expert_of[row], lambda row: expert_of[np.concatenate([[0], row[:-1]])]]
    training, held_out = halves(trace_by_rule(tokens, SHAPE, rules, weights))
    embedding = torch.from_numpy(rng.normal(0, 1, (VOCAB, 16)).astype(np.float32))
    return training, held_out, embedding, weights


@pytest.fixture(scope="module")
def trained(world):
    training, held_out, embedding, _ = world
    settings = TrainSettings(epochs=25, lr=1e-2, batch_size=32, hidden=48, ce_weight=0.5)
    return train(training, held_out, settings, embedding)


def test_the_hash_function_learns_experts_that_depend_on_the_token_and_on_the_one_before_it(trained):
    _, accuracy = trained
    top1 = accuracy.rates()["top1"]
    assert top1[BY_ITSELF] > 0.97
    assert top1[BY_THE_ONE_BEFORE] > 0.9


def test_the_token_table_learns_only_experts_that_depend_on_the_token(world):
    training, held_out, _, _ = world
    top1 = evaluate(TokenTable.fit(training, SHAPE, Width(3)), held_out, SHAPE).rates()["top1"]
    assert top1[BY_ITSELF] == 1
    assert top1[BY_THE_ONE_BEFORE] < 2 / EXPERTS


def test_the_scaling_factor_is_learned(trained, world):
    _, held_out, embedding, weights = world
    network, _ = trained
    table = LSTMPredictor(network, SHAPE, embedding, Width(EXPERTS)).predict(held_out.tokens)
    for scaling, weight in zip(table.scaling, weights, strict=True):
        true = weight[held_out.tokens.flat(ENCODER)]
        predicted = scaling.sum(axis=1)  # all experts share the factor
        assert np.corrcoef(predicted, true)[0, 1] > 0.7
        assert np.abs(predicted - true).mean() < 0.75 * np.abs(true.mean() - true).mean()


def test_training_again_with_the_same_seed_gives_the_same_network(world):
    training, held_out, embedding, _ = world
    settings = TrainSettings(epochs=1, batch_size=64, hidden=8)
    states = [train(training, held_out, settings, embedding, seed)[0].state_dict() for seed in (3, 3, 4)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_the_network_returned_is_that_of_the_best_epoch(world):
    training, _, embedding, _ = world
    # held out: the same rows, but every token goes to an expert that training never names for it,
    # so that the better the network gets, the worse it is judged
    wrong = [dataclasses.replace(layer, top=(layer.top + 1) % EXPERTS) for layer in training.layers]
    held_out = select(Trace(training.tokens, tuple(wrong)), np.arange(60), SHAPE)
    epochs = []
    settings = TrainSettings(epochs=8, lr=1e-2, batch_size=32, hidden=32, ce_weight=0.5)
    network, best = train(
        training, held_out, settings, embedding, on_epoch=lambda epoch, accuracy: epochs.append(accuracy.mean_top1)
    )
    assert len(epochs) == 8
    assert max(epochs) > epochs[-1] + 0.02  # otherwise this shows nothing
    assert best.mean_top1 == max(epochs)
    again = evaluate(LSTMPredictor(network, SHAPE, embedding, Width(3)), held_out, SHAPE)
    assert again == best


def test_training_reports_every_step(world):
    training, held_out, embedding, _ = world
    losses = []
    settings = TrainSettings(epochs=2, batch_size=50, hidden=8)
    train(training, held_out, settings, embedding, on_step=losses.append)
    assert len(losses) == 2 * -(-training.tokens.size // 50)
    assert np.isfinite(losses).all()


def teacher(top: list[list[int]], probabilities: list[list[float]], weight: list[float]) -> LayerTrace:
    return LayerTrace(np.array(top, np.int16), np.array(probabilities, np.float16), np.array(weight, np.float16))


def test_layer_loss_is_the_sum_of_its_three_terms():
    torch.manual_seed(0)
    logits, scale = torch.randn(3, 5), torch.rand(3)
    top, p = [[0, 2, 4], [1, 0, 3], [4, 3, 2]], [[0.5, 0.25, 0.125], [0.75, 0.125, 0.0625], [0.5, 0.25, 0.125]]
    truth = teacher(top, p, [0.5, 0.75, 0.25])
    settings = TrainSettings(top_t=2, ce_weight=0.25)
    distance = 0.0
    for token in range(3):
        kept = torch.tensor(p[token][:2]) / sum(p[token][:2])
        student = logits[token, top[token][:2]].exp()
        distance -= (kept * (student / student.sum()).log()).sum() / 3
    choice = cross_entropy(logits, torch.tensor([0, 1, 4]))
    size = mse_loss(scale, torch.tensor([0.5, 0.75, 0.25]))
    torch.testing.assert_close(layer_loss(logits, scale, truth, settings), distance + 0.25 * choice + size)


def test_distillation_looks_at_the_top_t_experts_only():
    torch.manual_seed(0)
    logits, scale = torch.randn(2, 6), torch.zeros(2)
    p = [[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]]
    top = [[0, 1, 2, 3], [5, 4, 3, 2]]
    settings = TrainSettings(top_t=2, ce_weight=0)
    loss = layer_loss(logits, scale, teacher(top, p, [0, 0]), settings)
    outside = logits.clone()
    outside[0, 2:] += 5
    outside[1, :4] -= 5
    assert layer_loss(outside, scale, teacher(top, p, [0, 0]), settings) == loss
    inside = logits.clone()
    inside[0, 1] += 5
    assert layer_loss(inside, scale, teacher(top, p, [0, 0]), settings) != loss
    wider = TrainSettings(top_t=4, ce_weight=0)
    assert layer_loss(outside, scale, teacher(top, p, [0, 0]), wider) != layer_loss(logits, scale, teacher(top, p, [0, 0]), wider)


def test_the_loss_of_a_batch_counts_real_tokens_only_and_all_alike():
    shape = RoutingShape(experts=(6, 4), streams=(ENCODER, DECODER), top_k=1, vocab_size=VOCAB)
    rng = np.random.default_rng(1)
    trace = random_trace(rng, ragged(rng, rows=4, vocab=VOCAB, streams=2), shape)
    embedding = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network, settings = HashFunction(shape, 8, 16), TrainSettings(ce_weight=0.5)
    together = distillation_loss(network, trace, shape, embedding, settings)
    totals, tokens = torch.zeros(2), torch.zeros(2)
    for row in range(4):
        alone = select(trace, np.array([row]), shape)
        for layer, stream in enumerate(shape.streams):  # a network with this layer's outputs only
            only = RoutingShape((shape.experts[layer],), (stream,), 1, VOCAB)
            part = HashFunction(only, 8, 16)
            state = network.state_dict()
            kept = {n: v for n, v in state.items() if not n.startswith(("heads", "scales"))}
            kept |= {f"heads.0.{n}": state[f"heads.{layer}.{n}"] for n in ("weight", "bias")}
            kept |= {f"scales.{n}": state[f"scales.{n}"][layer : layer + 1] for n in ("weight", "bias")}
            part.load_state_dict(kept)
            count = int(alone.tokens.lengths[stream].sum())
            one_layer = Trace(alone.tokens, (alone.layers[layer],))
            totals[layer] += count * distillation_loss(part, one_layer, only, embedding, settings).detach()
            tokens[layer] += count
    torch.testing.assert_close(together.detach(), (totals / tokens).mean(), rtol=1e-4, atol=1e-5)


def rows_of(count: int, same: int = 1) -> TokenBatch:
    """Rows of which each stands there `same` times."""
    return TokenBatch((tuple(np.array([row // same, 1]) for row in range(count)),))


@pytest.mark.parametrize("rows", [3, 7, 10, 101])
@pytest.mark.parametrize("holdout", [0.001, 0.1, 0.5, 0.999])
def test_split_gives_every_row_to_one_part_and_none_of_them_is_empty(rows, holdout):
    for seed in range(3):
        training, chosen_by, judged_by = (part.tolist() for part in split(rows_of(rows), holdout, seed))
        assert training and chosen_by and judged_by
        held = {*chosen_by, *judged_by}
        assert sorted([*training, *held]) == list(range(rows))
        assert abs(len(held) - rows * holdout) <= 1


def test_of_two_rows_one_is_trained_on_and_the_other_held_out():
    training, chosen_by, judged_by = split(rows_of(2), 0.5, 0)
    assert len(training) == len(chosen_by) == 1
    assert chosen_by.tolist() == judged_by.tolist() != training.tolist()


def test_split_never_judges_by_a_text_that_was_trained_on():
    tokens = rows_of(60, same=3)
    parts = [{tokens.streams[0][row].tobytes() for row in part} for part in split(tokens, 0.4, 0)]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_split_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = (split(rows_of(50), 0.2, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])


def test_training_ends_early_once_nothing_gets_better(world):
    training, _, embedding, _ = world
    wrong = [dataclasses.replace(layer, top=(layer.top + 1) % EXPERTS) for layer in training.layers]
    worse = select(Trace(training.tokens, tuple(wrong)), np.arange(60), SHAPE)  # the more is learned, the worse this is predicted
    settings = TrainSettings(epochs=40, lr=1e-2, batch_size=32, hidden=16, ce_weight=0.5, patience=2)
    learner = LSTMLearner(SHAPE, embedding, settings, 0)
    history = fit(learner, training, worse, SHAPE, settings, 0)
    best = max(range(len(history)), key=lambda i: history[i].top1)
    assert len(history) == best + 1 + 2 < 40


class Killed(Exception):
    pass


@pytest.mark.parametrize("schedule", ["one_cycle", "constant"])
def test_an_interrupted_training_ends_as_one_that_was_not(world, tmp_path, schedule):
    training, held_out, embedding, _ = world
    settings = TrainSettings(epochs=4, lr=1e-2, batch_size=64, hidden=8, schedule=schedule)
    whole = LSTMLearner(SHAPE, embedding, settings, 0)
    expected = fit(whole, training, held_out, SHAPE, settings, 0)
    checkpoint, seen = Checkpoint(tmp_path / "state", "id"), []

    def kill(epoch, accuracy):
        seen.append(epoch)
        if seen == [0, 1, 2]:
            raise Killed

    with pytest.raises(Killed):
        fit(LSTMLearner(SHAPE, embedding, settings, 0), training, held_out, SHAPE, settings, 0, checkpoint, on_epoch=kill)
    again = LSTMLearner(SHAPE, embedding, settings, 5)  # nothing of the new one's start is left
    assert fit(again, training, held_out, SHAPE, settings, 0, checkpoint, on_epoch=kill) == expected
    assert seen == [0, 1, 2, 2, 3]
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


def test_the_state_of_another_training_or_half_a_file_is_not_taken_up(world, tmp_path):
    training, held_out, embedding, _ = world
    settings = TrainSettings(epochs=2, batch_size=64, hidden=8)

    def epochs_run(identity: str) -> int:
        seen = []
        learner = LSTMLearner(SHAPE, embedding, settings, 0)
        checkpoint = Checkpoint(tmp_path / "state", identity)
        fit(learner, training, held_out, SHAPE, settings, 0, checkpoint, on_epoch=lambda epoch, accuracy: seen.append(epoch))
        return len(seen)

    assert [epochs_run("one"), epochs_run("one"), epochs_run("other")] == [2, 0, 2]
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-9])
    assert epochs_run("other") == 2


def test_a_calibrated_predictor_is_as_often_right_as_it_says(trained, world):
    """One that was made surer than it may be is cooled down."""
    _, held_out, embedding, _ = world
    network, _ = trained
    sure = LSTMPredictor(network, SHAPE, embedding, Width(1))
    sharper = Sharper(sure, 4.0)
    temperatures = calibrate(sharper, held_out, SHAPE)
    for layer, temperature in enumerate(temperatures):
        said = inclusion(np.concatenate([sharper.logits(held_out.tokens)[layer]]), temperature, 1)
        right = said.argmax(axis=1) == held_out.layers[layer].top[:, 0]
        assert abs(said.max(axis=1).mean() - right.mean()) < 0.05


class Sharper:
    """A predictor whose logits are all several times too large."""

    def __init__(self, inner: LSTMPredictor, factor: float):
        self.inner, self.factor = inner, factor

    def logits(self, tokens: TokenBatch) -> list[np.ndarray]:
        return [self.factor * layer for layer in self.inner.logits(tokens)]


@pytest.mark.parametrize("rows_at_once", [1, 7, 100])
def test_evaluate_counts_every_token_once_however_the_rows_are_batched(rows_at_once):
    rng = np.random.default_rng(2)
    trace = random_trace(rng, ragged(rng, rows=20, vocab=VOCAB), SHAPE)
    table = TokenTable.fit(trace, SHAPE, Width(3))
    accuracy = evaluate(table, trace, SHAPE, rows_at_once)
    assert accuracy.tokens == [len(trace.tokens.flat(ENCODER))] * 2
    assert accuracy == evaluate(table, trace, SHAPE)
