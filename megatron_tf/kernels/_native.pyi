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

class _AttendRows(Protocol):
    def __call__(
        self,
        q: int,
        k: int,
        v: int,
        out: int,
        /,
        *,
        keys: int,
        values: int,
        past: list[int],
        tokens: int,
        heads: int,
        dim: int,
        capacity: int,
        threads: int,
    ) -> None: ...

multiply_rows_fp32: _MultiplyRows
multiply_rows_bf16: _MultiplyRows
pattend_rows_fp32: _PattendRows
pattend_rows_bf16: _PattendRows
attend_rows_fp32: _AttendRows
attend_rows_bf16: _AttendRows

class Fp32Rows:
    def __init__(self, scores: int, /, *, norm: str, rows: int, tokens: int, threads: int) -> None: ...
    def statistics(self, *, out: int) -> None: ...
    def weights(self, *, factor: int, out: int) -> None: ...
    def forward(self, *, tau: int, factor: int, out: int) -> None: ...
    def backward_activation(self, *, factor: int, grad: int, out: int, inner: int) -> None: ...
    def backward_norm(self, *, factor: int, share: int, grad: int) -> None: ...
    def backward(self, *, tau: int, factor: int, grad: int, out: int) -> None: ...

class Bf16Rows(Fp32Rows): ...

class Fp32Block:
    def __init__(
        self,
        *,
        keys: list[int],
        values: list[int],
        taus: list[float],
        tokens: list[int],
        norm: str,
        heads: int,
        dim: int,
        epsilon: float,
        threads: int,
    ) -> None: ...
    def run(
        self,
        x: int,
        out: int,
        /,
        *,
        tokens: int,
        cos: int,
        sin: int,
        rotated: int,
        tokens_of_position: int,
        keys: int,
        values: int,
        past: list[int],
        capacity: int,
    ) -> None: ...

class Bf16Block(Fp32Block): ...
