from typing import Protocol

class _MultiplyRows(Protocol):
    def __call__(
        self, x: int, weight: int, out: int, /, *, rows: int, outputs: int, columns: int, threads: int
    ) -> None: ...

class _PattendRows(Protocol):
    def __call__(
        self,
        x: int,
        out: int,
        /,
        *,
        keys: list[int],
        values: list[int],
        taus: list[float],
        norm: str,
        rows: int,
        tokens: int,
        width_in: int,
        width_out: int,
        threads: int,
    ) -> None: ...

multiply_rows_fp32: _MultiplyRows
multiply_rows_bf16: _MultiplyRows
pattend_rows_fp32: _PattendRows
pattend_rows_bf16: _PattendRows
