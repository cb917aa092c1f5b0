"""The compiled module: addresses and sizes only; shapes and dtypes are checked by each operation."""

def consensus_f32(
    score: int,
    reference: int,
    cos_limit: int,
    tan_limit: int,
    filtered: int,
    kept: int,
    b: int,
    c: int,
    h: int,
    w: int,
    chunk: int,
    mode: int,
    /,
) -> None: ...
def consensus_f64(
    score: int,
    reference: int,
    cos_limit: int,
    tan_limit: int,
    filtered: int,
    kept: int,
    b: int,
    c: int,
    h: int,
    w: int,
    chunk: int,
    mode: int,
    /,
) -> None: ...
