"""The language models of the paper: next-character and next-word LSTMs.

A model takes symbols [batch, steps] to logits [batch, steps, symbols], the prediction of what
follows each of them. Sequences shorter than `steps` are padded at their end; whatever follows a
padding symbol does not count (see the losses for sequences in `potluck.models.losses`).

`CharLSTM` is the paper's model without its peepholes, on PyTorch's own LSTM: the faster one, and
the one our results use. `PeepholeCharLSTM` has the paper's parameters to the last one.

The paper does not say how its weights start. PyTorch draws all of an LSTM's within ± 1 / √hidden.
An embedding of 8 then moves a gate by a tenth, and the first layer moves the second by a hundredth.
The first rounds of training are spent on making these weights larger. Here all gates, and the
output, start with variance 1 for inputs of the size that they have, with an orthogonal matrix for
what a gate remembers (A. M. Saxe, J. L. McClelland, S. Ganguli: Exact solutions to the nonlinear
dynamics of learning in deep linear neural networks. ICLR 2014), and without biases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from potluck.core.validate import as_count
from potluck.models.peephole_lstm import PeepholeLSTM, start_gates, start_inputs

_STATE_SIZE = 0.25
"""The standard deviation that the states of an LSTM have about, when it starts."""


class CharLSTM(nn.Module):
    """The paper's character model on `nn.LSTM`: 867,090 parameters with 258 symbols.

    An embedding of 8, two LSTM layers of 256, and a linear layer to the next symbol. Beside the
    paper's it has a second bias for every gate (2,048 more) and no peepholes (1,536 fewer).
    """

    def __init__(self, symbols: int = 258, embedding: int = 8, hidden: int = 256) -> None:
        super().__init__()
        symbols, embedding, hidden = _sizes(symbols=symbols, embedding=embedding, hidden=hidden)
        self.embedding = nn.Embedding(symbols, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.output = _output(hidden, symbols)
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                if name.startswith("weight_hh"):
                    start_gates(parameter)
                elif name.startswith("weight_ih"):
                    start_inputs(parameter, 1.0 if name.endswith("l0") else _STATE_SIZE)
                else:
                    parameter.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        """Symbols [batch, steps] to logits [batch, steps, symbols]."""
        hidden, _ = self.lstm(self.embedding(inputs.int()))
        return self.output(hidden)


class PeepholeCharLSTM(nn.Module):
    """The paper's character model: 866,578 parameters with 258 symbols.

    One bias a gate and diagonal peepholes, which is what makes the count the paper's.
    """

    def __init__(self, symbols: int = 258, embedding: int = 8, hidden: int = 256) -> None:
        super().__init__()
        symbols, embedding, hidden = _sizes(symbols=symbols, embedding=embedding, hidden=hidden)
        self.embedding = nn.Embedding(symbols, embedding)
        self.lstm1 = PeepholeLSTM(embedding, hidden)
        self.lstm2 = PeepholeLSTM(hidden, hidden, input_size=_STATE_SIZE)
        self.output = _output(hidden, symbols)

    def forward(self, inputs: Tensor) -> Tensor:
        """Symbols [batch, steps] to logits [batch, steps, symbols]."""
        embedded = self.embedding(inputs.int().t())  # [steps, batch, embedding]
        return self.output(self.lstm2(self.lstm1(embedded))).transpose(0, 1)


class WordLSTM(nn.Module):
    """The paper's large next-word model: 4,950,544 parameters with 10,000 words.

    An embedding of 192, one LSTM layer of 256 with peepholes, and a linear layer to the next word;
    the paper unrolls it over 10 words. The posts that it was trained on there are not public.
    """

    def __init__(self, words: int = 10_000, embedding: int = 192, hidden: int = 256) -> None:
        super().__init__()
        words, embedding, hidden = _sizes(words=words, embedding=embedding, hidden=hidden)
        self.embedding = nn.Embedding(words, embedding)
        self.lstm = PeepholeLSTM(embedding, hidden)
        self.output = _output(hidden, words)

    def forward(self, inputs: Tensor) -> Tensor:
        """Words [batch, steps] to logits [batch, steps, words]."""
        embedded = self.embedding(inputs.int().t())  # [steps, batch, embedding]
        return self.output(self.lstm(embedded)).transpose(0, 1)


def _sizes(**sizes: int) -> list[int]:
    return [as_count(name, size) for name, size in sizes.items()]


def _output(hidden: int, symbols: int) -> nn.Linear:
    output = nn.Linear(hidden, symbols)
    with torch.no_grad():
        start_inputs(output.weight, _STATE_SIZE)
        output.bias.zero_()
    return output
