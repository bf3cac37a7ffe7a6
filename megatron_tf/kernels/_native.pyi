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

class Fp32Rows:
    def __init__(self, scores: int, /, *, norm: str, rows: int, tokens: int, threads: int) -> None: ...
    def statistics(self, *, out: int) -> None: ...
    def weights(self, *, factor: int, out: int) -> None: ...
    def forward(self, *, tau: int, factor: int, out: int) -> None: ...
    def backward_activation(self, *, factor: int, grad: int, out: int, inner: int) -> None: ...
    def backward_norm(self, *, factor: int, share: int, grad: int) -> None: ...
    def backward(self, *, tau: int, factor: int, grad: int, out: int) -> None: ...

class Bf16Rows(Fp32Rows): ...
