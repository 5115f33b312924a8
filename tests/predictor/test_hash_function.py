"""The hash function: sparsemax, packing of rows, and tables that depend on nothing but the row itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from predictor.hash_function import PADDING, HashFunction, LSTMPredictor, pack, sparsemax
from predictor.hash_table import Width
from predictor.tokens import DECODER, ENCODER, RoutingShape, TokenBatch
from tests.predictor.made_traces import ragged

VOCAB = 50
BOTH = RoutingShape(experts=(8, 6, 4), streams=(ENCODER, ENCODER, DECODER), top_k=1, vocab_size=VOCAB)


def simplex_projection(scores: np.ndarray) -> np.ndarray:
    """The Euclidean projection, by bisection for the threshold: sum(max(score - threshold, 0)) falls as the threshold rises."""
    low, high = scores.max() - 1, scores.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(scores - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(scores - low, 0)


@pytest.mark.parametrize("width", [1, 2, 7, 40])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_sparsemax_is_the_projection_onto_the_simplex(width, spread):
    scores = np.random.default_rng(width).normal(0, spread, (20, width))
    result = sparsemax(torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(result, [simplex_projection(row) for row in scores], atol=1e-9)


def test_sparsemax_gives_nothing_to_masked_entries_and_projects_the_others():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, (30, 9))
    masked = rng.random((30, 9)) < 0.5
    masked[np.arange(30), rng.integers(0, 9, 30)] = False  # one entry stays
    result = sparsemax(torch.from_numpy(np.where(masked, -np.inf, scores))).numpy()
    assert (result[masked] == 0).all()
    for row, hidden, projected in zip(scores, masked, result, strict=True):
        np.testing.assert_allclose(projected[~hidden], simplex_projection(row[~hidden]), atol=1e-9)


def by_sorting(scores: torch.Tensor) -> torch.Tensor:
    """Sparsemax as its paper writes it, gradients by autograd."""
    ordered = scores.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(dim=-1)
    support = (1 + torch.arange(1, scores.shape[-1] + 1) * ordered > sums).sum(dim=-1, keepdim=True)
    return (scores - (sums.gather(-1, support - 1) - 1) / support).clamp(min=0)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 100.0])
def test_sparsemax_and_its_gradient_are_those_of_the_sort(spread):
    torch.manual_seed(0)
    scores = spread * torch.randn(3, 20, 50)
    hidden = torch.rand(scores.shape) < 0.3
    hidden[..., 0] = False  # one entry of each row stays
    weights = torch.randn(scores.shape)
    found = []
    for project in (sparsemax, by_sorting):
        leaf = scores.clone().requires_grad_()
        projected = project(leaf.masked_fill(hidden, float("-inf")))
        (gradient,) = torch.autograd.grad((projected * weights).sum(), leaf)
        found.append((projected.detach(), gradient))
    (projected, gradient), (sorted_projected, sorted_gradient) = found
    assert ((projected > 0) == (sorted_projected > 0)).all()
    torch.testing.assert_close(projected, sorted_projected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, sorted_gradient, rtol=1e-5, atol=1e-5)


def test_sparsemax_of_scores_that_are_no_numbers_ends_and_is_none_either():
    assert sparsemax(torch.tensor([[float("nan"), 1.0], [0.0, 2.0]]))[0].isnan().all()


def test_pack_puts_the_encoder_before_the_decoder_and_padding_last():
    ids, streams, visible = pack(
        TokenBatch((tuple(np.array(r) for r in ([5, 6, 7], [8])), tuple(np.array(r) for r in ([1, 2], [3]))))
    )
    assert ids.tolist() == [[5, 6, 7, 1, 2], [8, 3, 0, 0, 0]]
    e, d, p = ENCODER, DECODER, PADDING
    assert streams.tolist() == [[e, e, e, d, d], [e, d, p, p, p]]
    assert ids.dtype == streams.dtype == torch.int64
    assert visible.shape == (2, 5, 5)
    assert visible.dtype == torch.bool


@pytest.mark.parametrize("streams", [1, 2])
def test_pack_lets_each_token_see_the_encoder_the_decoder_before_it_and_no_padding(streams):
    _, kinds, visible = pack(ragged(np.random.default_rng(streams), rows=6, vocab=VOCAB, streams=streams))
    rows, width = kinds.shape
    for row in range(rows):
        for i in range(width):
            for j in range(width):
                kind, other = kinds[row, i].item(), kinds[row, j].item()
                if i == j:
                    expected = True
                elif kind == PADDING:
                    continue  # what padding sees nobody reads
                elif other == PADDING:
                    expected = False
                elif kind == ENCODER:
                    expected = other == ENCODER
                else:
                    expected = other == ENCODER or j < i
                assert visible[row, i, j].item() == expected, (row, i, j)


@pytest.fixture(scope="module")
def predictor() -> LSTMPredictor:
    torch.manual_seed(0)
    network = HashFunction(BOTH, embedding_dim=12, hidden=16)
    for parameter in network.parameters():
        parameter.data.mul_(2)  # far from uniform
    return LSTMPredictor(network, BOTH, torch.randn(VOCAB, 12), Width(3))


def rows_of(tokens: TokenBatch, rows: list[int]) -> TokenBatch:
    return TokenBatch(tuple(tuple(stream[i] for i in rows) for stream in tokens.streams))


def assert_rows_have_the_same_table(predictor: LSTMPredictor, tokens: TokenBatch, together, alone_of) -> None:
    """Compares each row's part of a table with the table of that row by itself."""
    for layer, stream in enumerate(BOTH.streams):
        ends = np.cumsum(tokens.lengths[stream])
        for row in range(tokens.size):
            part = slice(ends[row] - tokens.lengths[stream][row], ends[row])
            alone = alone_of(row)
            np.testing.assert_allclose(together.probability[layer][part], alone.probability[layer], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(together.scaling[layer][part], alone.scaling[layer], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(together.experts[layer][part], alone.experts[layer])


def test_a_rows_table_does_not_depend_on_the_rest_of_the_batch(predictor):
    tokens = ragged(np.random.default_rng(5), rows=7, vocab=VOCAB, streams=2)
    together = predictor.predict(tokens)
    assert_rows_have_the_same_table(predictor, tokens, together, lambda row: predictor.predict(rows_of(tokens, [row])))


def test_tokens_of_a_table_are_in_the_order_of_the_batchs_flat_tokens(predictor):
    tokens = ragged(np.random.default_rng(6), rows=5, vocab=VOCAB, streams=2)
    table = predictor.predict(tokens)
    for layer, stream in enumerate(BOTH.streams):
        assert len(table.experts[layer]) == len(tokens.flat(stream))
    order = [3, 0, 4, 2, 1]
    shuffled = predictor.predict(rows_of(tokens, order))
    for layer, stream in enumerate(BOTH.streams):
        ends = np.cumsum(tokens.lengths[stream])
        pick = np.concatenate([np.arange(ends[i] - tokens.lengths[stream][i], ends[i]) for i in order])
        np.testing.assert_array_equal(tokens.flat(stream)[pick], rows_of(tokens, order).flat(stream))
        np.testing.assert_allclose(shuffled.probability[layer], table.probability[layer][pick], rtol=1e-4, atol=1e-6)


def test_the_embedding_of_the_padding_id_never_counts(predictor):
    tokens = ragged(np.random.default_rng(7), rows=5, vocab=VOCAB, streams=2)
    poisoned = predictor.embedding.clone()
    poisoned[0] = 1e4
    other = LSTMPredictor(predictor.network, BOTH, poisoned, Width(3)).predict(tokens)
    for mine, theirs in zip(predictor.predict(tokens).probability, other.probability, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_what_the_decoder_reads_changes_nothing_for_the_encoder_nor_for_what_stands_before_it(predictor):
    rng = np.random.default_rng(8)
    source, target = rng.integers(1, VOCAB, 6), rng.integers(1, VOCAB, 5)
    other = target.copy()
    other[3:] = (other[3:] + 7) % (VOCAB - 1) + 1
    one = predictor.predict(TokenBatch(((source,), (target,))))
    two = predictor.predict(TokenBatch(((source,), (other,))))
    for layer, stream in enumerate(BOTH.streams):
        unchanged = slice(0, 3) if stream == DECODER else slice(None)
        np.testing.assert_allclose(one.probability[layer][unchanged], two.probability[layer][unchanged], rtol=1e-5)
    assert not np.allclose(one.probability[2][3:], two.probability[2][3:], rtol=1e-3)


def test_probabilities_are_the_softmax_of_the_heads_and_scaling_factors_lie_between_0_and_1(predictor):
    tokens = ragged(np.random.default_rng(9), rows=3, vocab=VOCAB, streams=2)
    everything = LSTMPredictor(predictor.network, BOTH, predictor.embedding, Width(8)).predict(tokens)
    for p, scaling in zip(everything.probability, everything.scaling, strict=True):
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
        assert ((scaling.sum(axis=1) > 0) & (scaling.sum(axis=1) < 1)).all()


def test_embeddings_of_half_precision_give_the_same_choice(predictor):
    tokens = ragged(np.random.default_rng(10), rows=3, vocab=VOCAB, streams=2)
    rounded = predictor.embedding.bfloat16()
    half = LSTMPredictor(predictor.network, BOTH, rounded, Width(3)).predict(tokens)
    same = LSTMPredictor(predictor.network, BOTH, rounded.float(), Width(3)).predict(tokens)
    for a, b in zip(half.experts, same.experts, strict=True):
        np.testing.assert_array_equal(a, b)
