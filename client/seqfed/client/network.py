"""The run's network in torch, and the only place where torch's state_dict and the flat vector meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqfed.common.layout import Flat, Parameters, require_same
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec

RECURRENT: dict[str, type[nn.RNN] | type[nn.LSTM] | type[nn.GRU]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


def use_threads(count: int) -> None:
    """Threads for training in this process. Results are the same from run to run only for the same count."""
    torch.set_num_threads(count)


class SequenceClassifier(nn.Module):
    """A stack of recurrent layers over all steps, and a linear layer on the last step's state."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        self.layout = layout_of(spec)
        kind = RECURRENT[spec.model.kind]
        self.recurrent = kind(spec.data.features, spec.model.hidden, spec.model.layers, batch_first=True)
        self.head = nn.Linear(spec.model.hidden, spec.data.classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of x (batch, steps, features); `lengths` (batch,) where padding follows."""
        states, _ = self.recurrent(x)
        # A forward recurrence at its last real step has seen no padding, so packing would change nothing.
        last = states[:, -1] if lengths is None else states[torch.arange(len(x)), lengths - 1]
        logits: Tensor = self.head(last)
        return logits

    def load(self, parameters: Parameters) -> None:
        """Take over these numbers; raises LayoutMismatch if they are another model's."""
        require_same(self.layout, parameters.layout)
        views = self.layout.views(parameters.flat)
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(torch.from_numpy(views[name]))

    def save(self, out: Flat | None = None) -> Parameters:
        """A copy of the numbers as they stand now, in `out` if given."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.state_dict().items()}
        return Parameters(self.layout, self.layout.flatten(arrays, out))
