"""The command `seqfed demo`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from seqfed.client.data_flags import DataTable, with_data_flags


class Kind(StrEnum):
    """Recurrent layers."""

    RNN = "rnn"
    LSTM = "lstm"
    GRU = "gru"


class Partition(StrEnum):
    """How the data are split among the clients."""

    IID = "iid"
    DIRICHLET = "dirichlet"


@with_data_flags
def demo(
    data: DataTable,
    clients: Annotated[int, typer.Option(min=1, max=100, help="Client processes to start.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Rounds of FedAvg.")] = 30,
    model: Annotated[Kind, typer.Option(help="Recurrent layers.")] = Kind.LSTM,
    partition: Annotated[Partition, typer.Option(help="Split the data evenly or unevenly.")] = Partition.DIRICHLET,
    alpha: Annotated[float, typer.Option(min=0.01, max=1e6, help="Dirichlet: the smaller, the more uneven.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the split, the model and the training.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for model, curves and logs.")] = Path("seqfed-demo"),
    task: Annotated[str | None, typer.Option(help="With --data: what to learn [guessed by the labels].")] = None,
    grid: Annotated[
        float | None, typer.Option(help="With --data in long format: a step's length, in the unit of the time column.")
    ] = None,
    secure: Annotated[
        bool, typer.Option("--secure", help="Secure aggregation: the server sees sums over the clients only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, last line.")] = False,
) -> None:
    """Train one model on data split among several processes of this machine, and see why to federate.

    Starts a server and its clients as real processes on loopback, with TLS and certificates made for the occasion, gives each
    client its own part of scikit-learn's digits (8 steps of 8 features, 10 classes), trains, and compares with the pooled data
    and with each client alone. With --data it does the same on your own file: it is dealt among the clients; of several files
    each is one client's.
    """
    from seqfed.client.demo.run import Settings, run

    settings = Settings(clients, rounds, model.value, partition.value, alpha, seed, out, data, task, grid, secure)
    run(settings, as_json=as_json)
