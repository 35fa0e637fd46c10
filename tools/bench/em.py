"""What expectation maximisation costs at the sizes of SD1.5's self-attention at 512 x 512: the forms of `stem.em` in turn,
beside a plain matrix product.

Keys and values are random, in the memory layout that a model gives them, the keys about as long as those of the demo model: how
many responsibilities are so small that a processor is slow with them depends on that.
"""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stem.attention import pool_tokens
from stem.em import estimate_basis, initial_bases
from tools.bench import report
from tools.bench.cost import Cost

SIZES = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # tokens a frame, channels a head
FRAMES, QUICK_FRAMES = (8, 50), (8,)
DTYPES, QUICK_DTYPES = ("float32", "bfloat16"), ("float32",)
HEADS, BASES, ITERATIONS = 8, 256, 5
KEY_NORM = 2.7
FORMS = ("dense", "blockwise", "fused", "auto")
PRODUCT_ROWS = (256, 1024, 4096)  # of the plain product
ROUNDS = 3
LEAST = 0.5  # seconds; shorter work is repeated
MEASURES = {
    "dense_s": "seconds of one estimate, all responsibilities at once; median of the rounds",
    "auto_s": "seconds as the nodes do it",
    "speedup": "dense_s / auto_s",
    "dense_mb": "growth of the process's resident memory (10^6 bytes) during that",
    "auto_mb": "the same, as the nodes do it",
    "gemm_fraction": "multiplications and additions a second of `auto`, softmax not counted, over those of a plain "
    "float32 product of 256, 1,024 or 4,096 keys of every head and the bases, whichever is fastest",
}
COLUMNS = {
    **{f"{form}_s": (f"{form} (s)", ".4f") for form in FORMS},
    "speedup": ("dense / auto", ".1f"),
    "dense_mb": ("dense (MB)", ".1f"),
    "auto_mb": ("auto (MB)", ".1f"),
    "gemm_fraction": ("of a matrix product", ".2f"),
}


class Case(NamedTuple):
    frames: int
    tokens: int  # a frame
    heads: int
    dim: int  # channels a head
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.frames} frames, {self.tokens} tokens, {self.dtype}"


def run(path: Path, quick: bool) -> None:
    """Measures the cases that the file does not hold yet, and prints the table."""
    settings = {
        "num_bases": BASES,
        "iterations": ITERATIONS,
        "rounds": ROUNDS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "measures": MEASURES,
    }
    results = report.load(path, settings)
    found, forms = results.setdefault("cases", []), results.setdefault("forms", {})
    for case in cases(quick):
        if case.name not in forms:
            done, forms[case.name] = measure(case)
            found.append(done)
            report.save(path, results)
            print(f"{case.name} done", file=sys.stderr, flush=True)
    rows = {name: {f"{form}_s": seconds for form, seconds in each.items()} for name, each in forms.items()}
    print(report.table({name: rows[name] | done for name, done in zip(rows, found, strict=True)}, COLUMNS, "case"))


def cases(quick: bool) -> list[Case]:
    return [
        Case(frames, tokens, HEADS, dim, dtype)
        for dtype in (QUICK_DTYPES if quick else DTYPES)
        for frames in (QUICK_FRAMES if quick else FRAMES)
        for tokens, dim in SIZES
    ]


def measure(case: Case) -> tuple[dict[str, Any], report.Measures]:
    """A case with its measures, and the seconds of every form."""
    keys, values = random_tokens(case)
    initial = initial_bases(keys, BASES, seed=0)
    works = {form: partial(estimate_basis, keys, values, BASES, ITERATIONS, initial=initial, method=form) for form in FORMS}
    products = {rows: Product(case, rows) for rows in PRODUCT_ROWS}
    times: dict[Any, list[float]] = {name: [] for name in (*works, *products)}
    for form in FORMS:  # what a first call takes longer is not counted
        one = slice(0, case.tokens)
        estimate_basis(keys[:, one], values[:, one], BASES, 1, initial=initial, method=form)
    for _ in range(ROUNDS):
        for name, work in (works | products).items():
            times[name].append(seconds(work))
    forms = {form: median(times[form]) for form in FORMS}
    fastest = max(each.operations / median(times[rows]) for rows, each in products.items())
    done = {
        **case._asdict(),
        "dense_s": forms["dense"],
        "auto_s": forms["auto"],
        "speedup": forms["dense"] / forms["auto"],
        "dense_mb": peak_mb(works["dense"]),
        "auto_mb": peak_mb(works["auto"]),
        "gemm_fraction": operations(case) / forms["auto"] / fastest,
    }
    return done, forms


def random_tokens(case: Case) -> tuple[Tensor, Tensor]:
    """Keys and values (h, f n, d) as views of the (f, n, h d) that a model's projections give."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (case.frames, case.tokens, case.heads * case.dim), getattr(torch, case.dtype)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return pool_tokens(keys * (KEY_NORM / math.sqrt(case.dim)), case.heads), pool_tokens(values, case.heads)


class Product:
    """A plain product of `rows` keys of every head and the bases, (h, rows, m), into memory that is used again."""

    def __init__(self, case: Case, rows: int):
        generator = torch.Generator().manual_seed(0)
        self.keys = torch.randn(case.heads, rows, case.dim, generator=generator)
        self.bases = torch.randn(case.heads, case.dim, BASES, generator=generator)
        self.out = torch.empty(case.heads, rows, BASES)
        self.operations = 2 * case.heads * rows * case.dim * BASES

    def __call__(self) -> None:
        torch.bmm(self.keys, self.bases, out=self.out)


def operations(case: Case) -> int:
    """Multiplications and additions of one estimate: two products an iteration, and one more for the values."""
    return (2 * ITERATIONS + 1) * 2 * case.heads * case.frames * case.tokens * BASES * case.dim


def seconds(work: Callable[[], Any]) -> float:
    """Of one call, from as many as take `LEAST` together."""
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < LEAST:
        work()
        calls += 1
    return (time.perf_counter() - began) / calls


def peak_mb(work: Callable[[], Any]) -> float:
    with Cost() as cost:
        seconds(work)  # long enough for the memory to be seen
    return cost.peak_mb
