def multiply_rows_fp32(
    x: int, weight: int, out: int, /, *, rows: int, outputs: int, columns: int, threads: int
) -> None: ...
def multiply_rows_bf16(
    x: int, weight: int, out: int, /, *, rows: int, outputs: int, columns: int, threads: int
) -> None: ...
def pattend_rows_fp32(
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
def pattend_rows_bf16(
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
