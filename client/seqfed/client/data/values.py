"""Arrow's columns as numbers and as coded texts, under the settings' words for missing. pyarrow is loaded here."""

from __future__ import annotations

import importlib
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from seqfed.client.settings import DataSettings

MISSING: Final = ("", "NA", "NaN", "nan", "null", "None")
NUMBER: Final = r"^[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[iI][nN][fF]([iI][nN][iI][tT][yY])?|[nN][aA][nN])$"


class Reader:
    """Turns Arrow's columns into numbers and texts, under the settings' words for missing."""

    def __init__(self, settings: DataSettings) -> None:
        import pyarrow as pa

        self._words = pa.array([*MISSING, *settings.missing_values], pa.string())
        self._numbers = np.array([number for one in settings.missing_values if (number := _float(one)) is not None])

    def numbers(self, column: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
        """(n,) NaN where missing or no number; and bool (n,), where it is no number, None if nowhere."""
        import pyarrow as pa

        pc = compute()

        kind = column.type
        if is_textual(kind):
            values, texts = self._parsed(column.cast(pa.string()) if kind != pa.string() else column)
        elif is_numeric(kind):
            values = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False)
            texts = None
        else:
            return np.full(len(column), np.nan), column.is_valid().to_numpy(zero_copy_only=False)
        if len(self._numbers):
            values = np.where(np.isin(values, self._numbers), np.nan, values)
        return values, texts

    def _parsed(self, column: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
        import pyarrow as pa

        pc = compute()

        texts = None
        try:
            column[:256].cast(pa.float64())  # a failing cast takes thirty times as long as the check below
            found = column.cast(pa.float64())
        except pa.ArrowInvalid:
            column = self._blanked(column)
            fits = pc.fill_null(pc.match_substring_regex(column, NUMBER), True)
            if not pc.all(fits).as_py():
                texts = pc.invert(fits).to_numpy(zero_copy_only=False)
                column = pc.if_else(fits, column, pa.scalar(None, pa.string()))
            found = column.cast(pa.float64())
        return pc.fill_null(found, np.nan).to_numpy(zero_copy_only=False), texts

    def texts(self, column: Any) -> Any:
        """The values as an Arrow array of trimmed strings, null where missing; whole numbers without a point."""
        import pyarrow as pa

        pc = compute()

        if pa.types.is_floating(column.type):
            rounded = pc.if_else(pc.equal(pc.floor(column), column), column, pa.scalar(None, column.type))
            whole = pc.if_else(pc.less(pc.abs(rounded), 1e15), rounded, pa.scalar(None, column.type))
            column = pc.coalesce(whole.cast(pa.int64()).cast(pa.string()), column.cast(pa.string()))
        elif column.type != pa.string():
            column = column.cast(pa.string())
        return self._blanked(column)

    def _blanked(self, column: Any) -> Any:
        import pyarrow as pa

        pc = compute()

        trimmed = pc.utf8_trim_whitespace(column)
        return pc.if_else(pc.is_in(trimmed, value_set=self._words), pa.scalar(None, pa.string()), trimmed)


def compute() -> Any:
    """pyarrow.compute, whose functions are made at its import, so that no type checker knows them."""
    return importlib.import_module("pyarrow.compute")


def is_textual(kind: Any) -> bool:
    """Whether an Arrow type holds strings."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view")


def is_numeric(kind: Any) -> bool:
    """Whether an Arrow type holds numbers, truth values among them."""
    import pyarrow as pa

    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class Codes:
    """Texts as the places of a growing list."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def of(self, texts: Any) -> NDArray[np.int32]:
        """int32 (n,), -1 where null. texts: an Arrow array of strings."""
        encoded = texts.dictionary_encode()
        table = [self.places.setdefault(one, len(self.places)) for one in encoded.dictionary.to_pylist()]
        indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return np.array([*table, -1], np.int32)[np.asarray(indices, np.int64)]
