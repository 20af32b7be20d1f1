"""Bidirectional GRU and LSTM over padded rows of words, in plain operations that export.

Weights have the names and the layout of ``nn.GRU`` and ``nn.LSTM``; results are those of packed
sequences. ONNX's own recurrent operators are avoided: runtimes disagree about their lengths input,
and a quantizer cannot look inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("gru", "lstm")


class WordVectors(nn.Embedding):
    """A table of word vectors such as GloVe's (Pennington et al., EMNLP 2014); id 0 is padding.

    ids [B, T] int32 or int64 to [B, T, width].
    """

    def __init__(self, vocabulary: int, width: int = 300) -> None:
        super().__init__(vocabulary, width)


class BiRecurrent(nn.Module):
    """One layer, both directions, over rows that begin with their words.

    x:       [B, T, inputs] float32, finite at padding.
    words:   [B, T] bool, left-aligned: no word after the first padding.
    returns: [B, T, 2 * hidden]: forward beside backward direction, zero at padding.

    The T steps are unrolled; the inputs of all are projected by one product. Forward, padding comes
    last and reaches no word. Backward, the state stays zero until the last word.
    """

    def __init__(self, kind: str, inputs: int, hidden: int) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not one of {KINDS}")
        layer = nn.GRU if kind == "gru" else nn.LSTM
        self.rnn = layer(inputs, hidden, batch_first=True, bidirectional=True)
        self.register_buffer("zero", torch.zeros(1, 1), persistent=False)  # stretches to any state

    zero: Tensor

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        present = words[:, :, None].unbind(1)
        ahead, back = self._run(x, present, ""), self._run(x, present, "_reverse")
        out = torch.cat((torch.stack(ahead, 1), torch.stack(back, 1)), dim=2)
        return torch.where(words[:, :, None], out, 0.0)

    def _run(self, x: Tensor, present: tuple[Tensor, ...], suffix: str) -> list[Tensor]:
        """States [B, hidden] after every step, in the order of the words."""
        rnn = self.rnn
        projected = F.linear(x, rnn.get_parameter(f"weight_ih_l0{suffix}"),
                             rnn.get_parameter(f"bias_ih_l0{suffix}")).unbind(1)  # fmt: skip
        weight = rnn.get_parameter(f"weight_hh_l0{suffix}")
        bias = rnn.get_parameter(f"bias_hh_l0{suffix}")
        step = _gru if isinstance(rnn, nn.GRU) else _lstm
        state: tuple[Tensor, ...] = (self.zero, self.zero)
        states: list[Tensor] = []
        steps = range(len(projected))
        for t in reversed(steps) if suffix else steps:
            recurrent = F.linear(state[0], weight, bias) if states else bias[None]
            new = step(projected[t], recurrent, state)
            if suffix:
                new = tuple(torch.where(present[t], n, o) for n, o in zip(new, state, strict=False))
            state = new
            states.append(state[0])
        return states[::-1] if suffix else states


def _gru(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cho et al., EMNLP 2014, in cuDNN's form; x and h [B, 3 * hidden]: reset, update, new."""
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = x.chunk(3, 1), h.chunk(3, 1)
    new = torch.tanh(x_new + torch.sigmoid(x_reset + h_reset) * h_new)
    update = torch.sigmoid(x_update + h_update)
    return (new + update * (state[0] - new),)


def _lstm(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hochreiter and Schmidhuber, 1997; x and h [B, 4 * hidden]: input, forget, new, output."""
    take, keep, new, give = (x + h).chunk(4, 1)
    cell = torch.sigmoid(keep) * state[1] + torch.sigmoid(take) * torch.tanh(new)
    return torch.sigmoid(give) * torch.tanh(cell), cell


def masked_mean(x: Tensor, words: Tensor) -> Tensor:
    """Mean over the words: x [B, T, D], words [B, T] bool to [B, D]; zero without words."""
    total = torch.where(words[:, :, None], x, 0.0).sum(1)
    return total / words.to(x.dtype).sum(1, keepdim=True).clamp_min(1.0)
