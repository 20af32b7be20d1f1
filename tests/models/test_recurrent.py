from __future__ import annotations

import onnxruntime as ort
import pytest
import torch
from refedge.export.from_torch import to_onnx
from refedge.export.lint import require_clean
from refedge.models.parts import BATCH, Method, Part, Port
from refedge.models.recurrent import KINDS, BiRecurrent, WordVectors, masked_mean
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

LENGTHS = (7, 1, 4, 6)
STEPS, WIDTH, HIDDEN = 7, 5, 6


def words_of(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.arange(STEPS)[None] < torch.tensor(lengths)[:, None]


def packed(module: BiRecurrent, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    rows = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(module.rnn(rows)[0], batch_first=True, total_length=STEPS)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs_packed_layer(kind: str) -> None:
    """Values, and gradients of the input and of every weight; float64, so only order differs."""
    torch.manual_seed(0)
    module = BiRecurrent(kind, WIDTH, HIDDEN).double()
    x = torch.randn(4, STEPS, WIDTH, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(4, STEPS, 2 * HIDDEN, dtype=torch.float64)
    leaves = [x, *module.parameters()]
    ours, theirs = module(x, words_of()), packed(module, x, LENGTHS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not ours[~words_of()].any()
    wanted = torch.autograd.grad((theirs * direction).sum(), leaves)
    found = torch.autograd.grad((ours * direction).sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    assert all(bool(g.any()) for g in found)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_have_no_influence(kind: str) -> None:
    torch.manual_seed(1)
    module = BiRecurrent(kind, WIDTH, HIDDEN).double()
    x, words = torch.randn(4, STEPS, WIDTH, dtype=torch.float64), words_of()
    other = torch.where(words[:, :, None], x, 100.0)
    assert torch.equal(module(x, words), module(other, words))
    alone = torch.cat([module(x[i : i + 1], words[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, module(x, words), rtol=0, atol=1e-12)


def test_weights_have_torchs_names_and_shapes() -> None:
    gru = BiRecurrent("gru", WIDTH, HIDDEN).state_dict()
    assert set(gru) == {f"rnn.{name}" for name in nn.GRU(1, 1, bidirectional=True).state_dict()}
    assert gru["rnn.weight_ih_l0_reverse"].shape == (3 * HIDDEN, WIDTH)
    assert BiRecurrent("lstm", WIDTH, HIDDEN).rnn.weight_hh_l0.shape == (4 * HIDDEN, HIDDEN)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'rnn'"):
        BiRecurrent("rnn", WIDTH, HIDDEN)


def test_mean_over_words() -> None:
    x = torch.randn(4, STEPS, WIDTH)
    words = words_of((7, 1, 4, 0))
    found = masked_mean(x, words)
    for row, length in enumerate((7, 1, 4)):
        torch.testing.assert_close(found[row], x[row, :length].mean(0))
    assert torch.equal(found[3], torch.zeros(WIDTH))


class _Text(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table = WordVectors(30, WIDTH)
        self.layer = BiRecurrent(kind, WIDTH, HIDDEN)

    def forward(self, ids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        states = self.layer(self.table(ids), words)
        return states, masked_mean(states, words)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_graph_is_plain_and_equal(kind: str) -> None:
    torch.manual_seed(2)
    module = _Text(kind).eval()

    def example(batch: int, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        words = torch.arange(STEPS)[None] < torch.randint(1, STEPS + 1, (batch, 1),
                                                          generator=generator)  # fmt: skip
        ids = torch.randint(0, 30, (batch, STEPS), generator=generator)
        return ids.to(torch.int32), words

    part = Part(
        "text",
        Method(module, module.forward),
        (Port("ids", "int32", (BATCH, STEPS)), Port("words", "bool", (BATCH, STEPS))),
        (Port("states", "float32", (BATCH, STEPS, 2 * HIDDEN)),
         Port("mean", "float32", (BATCH, 2 * HIDDEN))),
    )  # fmt: skip
    model = to_onnx(part)
    require_clean(model)
    assert not {node.op_type for node in model.graph.node} & {"GRU", "LSTM", "Loop", "Scan"}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    for batch in (1, 4):
        ids, words = example(batch, 5)
        found = session.run(None, {"ids": ids.numpy(), "words": words.numpy()})
        with torch.no_grad():
            for ours, theirs in zip(found, module(ids, words), strict=True):
                # states are below one; seven steps of float32 rounding
                torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=2e-6)
