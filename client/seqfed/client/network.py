"""The run's network in torch, and the only place where torch's state_dict and the flat vector meet."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqfed.client.custom import builder
from seqfed.common.errors import ConfigError, PolicyRefused, TrainingFailed
from seqfed.common.layout import Flat, Layout, Parameters, require_same
from seqfed.common.model import layout_of
from seqfed.common.spec import RunSpec

State = Tensor | tuple[Tensor, Tensor] | None  # of the recurrent layers after a step; an LSTM's is two


def use_threads(count: int) -> None:
    """Threads for training in this process. Results are the same from run to run only for the same count."""
    torch.set_num_threads(count)


def device_of(wanted: str) -> torch.device:
    """The device that the setting auto, cpu or cuda stands for; raises ConfigError if there is no such device."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no GPU here; set device = 'auto' or 'cpu'")
    if wanted not in {"cpu", "cuda"}:
        raise ConfigError(f"device = '{wanted}' is not known; use auto, cpu or cuda")
    return torch.device(wanted)


class Recurrent(nn.Module):
    """An embedding if the steps are tokens, recurrent layers over the steps, pooling, and a linear layer."""

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        model = spec.model
        tokens = spec.data.vocabulary is not None
        self.embedding = nn.Embedding(spec.data.inputs, model.embedding) if tokens else None
        self.recurrent = _recurrent(spec, model.embedding if tokens else spec.data.inputs)
        width = (model.projection or model.hidden) * (2 if model.bidirectional else 1)
        self.pooling: Literal["last", "mean", "attention"] = model.pooling
        self.attention = nn.Linear(width, 1) if model.pooling == "attention" else None
        self.head = nn.Linear(width, spec.outputs)
        self.each_step = spec.task.kind == "next_token"

    def forward(self, x: Tensor, lengths: Tensor | None = None, truncate: int | None = None) -> Tensor:
        """As Network's; with `truncate` the gradient goes back through so many steps at most.

        The steps are then read in segments of `truncate`; each takes over the state of the one before as a constant.
        """
        if truncate is None or truncate >= x.shape[1]:
            return self.read(self.states(x, lengths)[0], lengths)
        pieces, state = [], None
        for start in range(0, x.shape[1], truncate):
            # What no output is read from needs no gradient: memory and time for the segments that end a sequence only.
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._is_read(start, truncate, x, lengths)):
                piece, state = self.states(x[:, start : start + truncate], None, state)
            pieces.append(piece)
            state = detached(state)
        return self.read(torch.cat(pieces, 1), lengths)

    def states(self, x: Tensor, lengths: Tensor | None, state: State = None) -> tuple[Tensor, State]:
        """The last layer's states (B, T, width) at every step, and all layers' at the end, from `state` (or zeros) on."""
        steps = x if self.embedding is None else self.embedding(x)
        if lengths is None or not self.recurrent.bidirectional:
            # A forward recurrence has seen no padding at its last real step, so packing would change nothing.
            states, after = self.recurrent(steps, state)
            return states, after
        packed = pack_padded_sequence(steps, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, after = self.recurrent(packed, state)
        return pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])[0], after

    def read(self, states: Tensor, lengths: Tensor | None) -> Tensor:
        """The outputs of the last layer's states (B, T, width)."""
        outputs: Tensor = self.head(states if self.each_step else self._pooled(states, lengths))
        return outputs

    def _pooled(self, states: Tensor, lengths: Tensor | None) -> Tensor:
        """The states (B, T, width) as one (B, width), of real steps only."""
        if self.pooling == "last":
            last = states[:, -1] if lengths is None else states[_rows(states), lengths.to(states.device) - 1]
            if not self.recurrent.bidirectional:
                return last
            # The backward direction has read the whole sequence when it comes to the first step.
            width = states.shape[2] // 2
            return torch.cat([last[:, :width], states[:, 0, width:]], 1)
        padding = None
        if lengths is not None:
            steps = torch.arange(states.shape[1], device=states.device)
            padding = steps >= lengths.to(states.device)[:, None]
            states = states.masked_fill(padding[:, :, None], 0)
        if self.attention is None:
            return states.mean(1) if lengths is None else states.sum(1) / lengths.to(states)[:, None]
        scores: Tensor = self.attention(states)[:, :, 0]
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        return torch.einsum("bt,btw->bw", scores.softmax(1), states)

    def _is_read(self, start: int, size: int, x: Tensor, lengths: Tensor | None) -> bool:
        """Whether an output is read from a state of the steps from `start` to `start + size`."""
        if self.each_step or self.pooling != "last":
            return True
        if lengths is None:
            return start + size >= x.shape[1]
        return bool(((lengths > start) & (lengths <= start + size)).any())


class Network(nn.Module):
    """A torch module and its layout: numbers go in and come out as one flat vector."""

    def __init__(self, body: nn.Module, spec: RunSpec) -> None:
        super().__init__()
        self.layout = layout_of(spec)
        self.body = body
        self._custom = spec.model.custom
        self._outputs = spec.outputs

    @property
    def device(self) -> torch.device:
        """Where its numbers lie, and where forward wants its arguments."""
        return next(self.body.parameters()).device

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Outputs (B, spec.outputs), or (B, T, spec.outputs) for next_token.

        x: float32 (B, T, inputs), or int64 (B, T) token ids. lengths: int64 (B,) real steps of each, from 1 to T, where
        padding follows; None if all have T. Padding never changes an output, except those of padded steps.
        Raises TrainingFailed if a custom module puts out anything else.
        """
        outputs = self.body(x, lengths)
        if self._custom is not None and (not isinstance(outputs, Tensor) or outputs.shape[-1:] != (self._outputs,)):
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TrainingFailed(f"model.custom = '{self._custom}' puts out {found}; (..., {self._outputs}) is due")
        return outputs  # type: ignore[no-any-return]

    def load(self, parameters: Parameters) -> None:
        """Take over these numbers; raises LayoutMismatch if they are another model's."""
        require_same(self.layout, parameters.layout)
        views = self.layout.views(parameters.flat)
        with torch.no_grad():
            for name, tensor in self.body.state_dict().items():
                tensor.copy_(torch.from_numpy(views[name]))

    def save(self, out: Flat | None = None) -> Parameters:
        """A copy of the numbers as they stand now, in `out` if given."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in self.body.state_dict().items()}
        return Parameters(self.layout, self.layout.flatten(arrays, out))


def network_for(spec: RunSpec, *, device: str = "cpu", allow_custom: Collection[str] = ()) -> Network:
    """The network of this specification on a device (auto, cpu, cuda); its numbers are yet to be loaded.

    allow_custom: the custom modules (module:function) that may be imported. Raises PolicyRefused for any other, ConfigError
    for one that makes no torch module, and for a device that is not there; LayoutMismatch if its tensors are not
    spec.model.tensors.
    """
    body = Recurrent(spec) if spec.model.custom is None else _custom(spec, allow_custom)
    network = Network(body, spec)
    require_same(network.layout, _layout(body))
    return network.to(device_of(device))


def custom_parameters(spec: RunSpec) -> Parameters:
    """The operator's side of a custom model: imports it, and gives its tensors (for model.tensors) and its own first numbers.

    The numbers depend on the run's seed. Precondition: whoever asks has named spec.model.custom themselves.
    Raises ConfigError as network_for does.
    """
    assert spec.model.custom is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        body = _custom(spec, {spec.model.custom})
    layout = _layout(body)
    return Parameters(layout, layout.flatten({name: one.numpy() for name, one in body.state_dict().items()}))


def _rows(states: Tensor) -> Tensor:
    return torch.arange(states.shape[0], device=states.device)  # not len(): a traced network keeps that as one number


def detached(state: State) -> State:
    """The same numbers, through which no gradient flows."""
    if state is None:
        return None
    return state.detach() if isinstance(state, Tensor) else (state[0].detach(), state[1].detach())


def _recurrent(spec: RunSpec, width: int) -> nn.RNN | nn.LSTM | nn.GRU:
    model = spec.model
    shared: dict[str, Any] = {
        "batch_first": True,
        "dropout": model.dropout if model.layers > 1 else 0.0,  # between layers; torch warns where there is one only
        "bidirectional": model.bidirectional,
    }
    match model.kind:
        case "lstm":
            return nn.LSTM(width, model.hidden, model.layers, proj_size=model.projection or 0, **shared)
        case "gru":
            return nn.GRU(width, model.hidden, model.layers, **shared)
        case "rnn":
            return nn.RNN(width, model.hidden, model.layers, nonlinearity=model.nonlinearity, **shared)


def _custom(spec: RunSpec, allowed: Collection[str]) -> nn.Module:
    """The custom module; raises PolicyRefused if it may not be imported, ConfigError if it is no module of float32 tensors."""
    assert spec.model.custom is not None
    name = spec.model.custom
    try:
        body = builder(name, allowed)(spec)
    except (ConfigError, PolicyRefused):
        raise
    except Exception as error:
        raise ConfigError(f"model.custom = '{name}' failed: {type(error).__name__}: {error}") from error
    if not isinstance(body, nn.Module):
        raise ConfigError(f"model.custom = '{name}' made a {type(body).__name__}; a torch.nn.Module is due")
    if not any(True for _ in body.parameters()):
        raise ConfigError(f"model.custom = '{name}' made a module without parameters; there is nothing to train")
    for tensor, numbers in body.state_dict().items():
        if numbers.dtype != torch.float32:
            raise ConfigError(
                f"model.custom = '{name}': tensor '{tensor}' is {numbers.dtype}, and only float32 can be averaged; "
                "register it with persistent=False, or use LayerNorm in place of BatchNorm"
            )
    return body


def _layout(body: nn.Module) -> Layout:
    return Layout(tuple((name, tuple(tensor.shape)) for name, tensor in body.state_dict().items()))
