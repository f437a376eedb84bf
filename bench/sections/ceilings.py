"""What the card reaches at best, which shares in all other tables refer to."""

from __future__ import annotations

from bench.roofline import Ceilings, copy_case, product_case
from bench.sections.work import Row, Work

ROWS = 128 * 257  # a batch of sequences with [S]
MLP_ROWS = 65536
# {size: (width of the Transformer, of the diffusion MLP)}
WIDTHS = {"B": (768, 1024), "L": (1024, 1280), "H": (1280, 1536)}


class CeilingsSection:
    """Device copies, and products at the models' shapes."""

    name = "ceilings"
    about = "What this card reaches: device copy (bytes read plus written), products at our shapes."
    code = ("bench/roofline.py",)

    def measure(self, work: Work) -> None:
        """See Section.measure."""
        for megabytes in (256, 1024):
            work.measure(copy_case(megabytes))
        for name, shape in product_shapes().items():
            work.measure(product_case(name, *shape))

    def table(self, rows: list[Row], ceilings: Ceilings) -> list[str]:
        """See Section.table."""
        head = ["| what | us | GB/s | TFLOP/s |", "|---|---:|---:|---:|"]
        return head + [line(row) for row in rows]


def product_shapes() -> dict[str, tuple[int, int, int]]:
    """{name: (m, n, k)}"""
    shapes = {"square": (8192, 8192, 8192)}
    for size, (width, mlp) in WIDTHS.items():
        shapes |= {
            f"{size} qkv": (ROWS, 3 * width, width),
            f"{size} proj": (ROWS, width, width),
            f"{size} fc1": (ROWS, 4 * width, width),
            f"{size} fc2": (ROWS, width, 4 * width),
            f"{size} weight gradient of fc1": (4 * width, width, ROWS),
            f"{size} diffusion fc": (MLP_ROWS, mlp, mlp),
            f"{size} diffusion modulation": (MLP_ROWS, 3 * mlp, mlp),
        }
    return shapes


def line(row: Row) -> str:
    """One measured ceiling."""
    (contender,) = row["contenders"].values()
    seconds = contender["seconds"]
    if not seconds:
        return f"| {row['case']} | failed | | |"
    rate = f"{row['flops'] / seconds / 1e12:.0f}" if row["flops"] else ""
    return f"| {row['case']} | {seconds * 1e6:.1f} | {row['bytes'] / seconds / 1e9:.0f} | {rate} |"


def ceilings_in(rows: list[Row]) -> Ceilings:
    """The fastest copy and the square product of a section's rows."""
    copies, products = [0.0], [0.0]
    for row in rows:
        (contender,) = row["contenders"].values()
        seconds = contender["seconds"]
        if seconds and ": copy " in row["case"]:
            copies.append(row["bytes"] / seconds)
        elif seconds and ": product square" in row["case"]:
            products.append(row["flops"] / seconds)
    return Ceilings(max(copies), max(products))
