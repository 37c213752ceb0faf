"""What products of few bits do to scores, gradients and weights, against fp64: fp32, TF32, and sums of bf16 products.

    python benchmarks/rounding.py [--model DIRECTORY --layer model.layers.3.mlp.down_proj] [--n 512 --m 256]

Everything is emulated on a CPU: operands are rounded as a tensor core takes them (TF32: 10 bits of mantissa; "2 bf16" and
"3 bf16": an fp32 operand as the sum of that many bf16 numbers, each pair multiplied, the smallest left out), products are
added up in fp32. ``--model`` takes inputs and output gradients of one layer of a real model on the program's own requests;
without it they are drawn, with a spectrum that falls like a language model's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BATCHES, BATCH, KEEP = 16, 4, 0.1
Product = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local causal LM")
    parser.add_argument("--layer", default="model.layers.3.mlp.down_proj", help="one linear layer of --model")
    parser.add_argument("--n", type=int, default=512, help="inputs, without --model")
    parser.add_argument("--m", type=int, default=256, help="outputs, without --model")
    parser.add_argument("--seed", type=int, default=0, help="of the requests, and of what is drawn")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    given = (arguments.model, arguments.layer, arguments.seed)
    batches, weight = of_model(*given) if arguments.model else drawn(arguments.m, arguments.n)
    x = torch.cat([x for _, x in batches]).double()
    u = torch.linalg.eigh(x.T @ x)[1].flip(1)
    tables = {"scores": scores(batches, u), "gradients": gradients(batches, u), "weights": weights(weight, u)}
    for name, table in tables.items():
        print(f"\n{name}")
        for way, row in table.items():
            print(f"  {way:8}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    said = {"layer": arguments.layer if arguments.model else "drawn", "shape": list(weight.shape), "seed": arguments.seed}
    print(json.dumps({**said, "tokens": len(x), "cpu_emulated": True, **tables}))


# ---------------------------------------------------------------- the ways to multiply


def tf32(x: Tensor) -> Tensor:
    """fp32 ``x`` rounded to TF32's 10 bits of mantissa, to nearest, ties to even."""
    bits = x.float().view(torch.int32)
    bits = bits + 0xFFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32)


def bf16_parts(x: Tensor, count: int) -> list[Tensor]:
    """``count`` bf16 numbers whose sum comes closest to fp32 ``x``, as fp32; fewer where nothing is left."""
    parts, rest = [], x.float()
    for _ in range(count):
        parts.append(rest.bfloat16().float())
        rest = rest - parts[-1]
        if not rest.any():
            break
    return parts


def of_bf16(count: int) -> Product:
    """a @ b of operands in ``count`` bf16 parts each; pairs whose sizes together are below the last part's are left out."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        left, right = bf16_parts(a, count), bf16_parts(b, count)
        pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < count]
        return sum((left[i] @ right[j] for i, j in sorted(pairs, key=sum, reverse=True)), torch.zeros(len(a), b.shape[1]))

    return product


WAYS: dict[str, Product] = {
    "fp32": lambda a, b: a.float() @ b.float(),
    "tf32": lambda a, b: tf32(a) @ tf32(b),
    "3 bf16": of_bf16(3),
    "2 bf16": of_bf16(2),
    "1 bf16": of_bf16(1),
}


# ---------------------------------------------------------------- what is made of them


def scores(batches: list[tuple[Tensor, Tensor]], u: Tensor) -> dict[str, dict[str, float]]:
    """S = Σ_b |g_bᵀ (x_b U)|: the error over the scores' own noise (standard error of the sum over batches), and which share
    of the frozen tenth is another; "noise" is the same of every other batch, twice."""
    exact = torch.stack([(g.double().T @ (x.double() @ u)).abs() for g, x in batches])
    total, noise = exact.sum(0), exact.std(0) * len(batches) ** 0.5
    chosen = frozen(total)
    table = {}
    for way, product in WAYS.items():
        found = sum(product(g.T, product(x, u.float())).abs().double() for g, x in batches)
        error = (found - total).abs() / noise
        table[way] = {
            "error / noise, median": float(error.median()),
            "largest": float(error.max()),
            "frozen otherwise": float((frozen(found) & ~chosen).sum() / chosen.sum()),
        }
    half = frozen(2 * exact[::2].sum(0))
    table["noise"] = {"frozen otherwise": float((half & ~chosen).sum() / chosen.sum())}
    return table


def frozen(total: Tensor) -> Tensor:
    """The highest ``KEEP`` of the scores."""
    return total >= total.flatten().kthvalue(round(total.numel() * (1 - KEEP))).values


def gradients(batches: list[tuple[Tensor, Tensor]], u: Tensor) -> dict[str, dict[str, float]]:
    """G U of a bf16 gradient: the error over the root mean square of G U; "bf16 G" is what rounding G itself has done."""
    g, x = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole = g.double().T @ x.double()
    rounded = whole.float().bfloat16()
    exact = rounded.double() @ u
    size = float(exact.square().mean().sqrt())
    table = {way: of_error(product(rounded.float(), u.float()).double() - exact, size) for way, product in WAYS.items()}
    return {**table, "bf16 G": of_error(exact - whole @ u, size)}


def weights(weight: Tensor, u: Tensor) -> dict[str, dict[str, float]]:
    """W = C Uᵀ of fp32 coefficients after an update of a thousandth: the error over the root mean square of W, and which share
    of the weights is another in bf16; "bf16 W" is what rounding W does."""
    c = (weight.double() @ u).float()
    c += 1e-3 * c.square().mean().sqrt() * torch.randn_like(c)
    exact = c.double() @ u.T
    size = float(exact.square().mean().sqrt())
    table = {}
    for way, product in WAYS.items():
        found = product(c, u.float().T.contiguous())
        other = float((found.bfloat16() != exact.float().bfloat16()).double().mean())
        table[way] = {**of_error(found.double() - exact, size), "other in bf16": other}
    return {**table, "bf16 W": of_error(exact.float().bfloat16().double() - exact, size)}


def of_error(error: Tensor, size: float) -> dict[str, float]:
    return {"rms error": float(error.square().mean().sqrt()) / size, "largest": float(error.abs().max()) / size}


# ---------------------------------------------------------------- inputs and output gradients of one layer


def drawn(m: int, n: int, tokens: int = 64) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(g [t, m], x [t, n]) in bf16 of each batch, and W [m, n] in bf16."""
    turn = torch.linalg.qr(torch.randn(n, n))[0] * torch.arange(1, n + 1).pow(-0.7)
    rows = [torch.randn(tokens * BATCH, n) @ turn.T for _ in range(BATCHES)]
    sizes = torch.randn(BATCHES, tokens * BATCH, 1).exp() * torch.randn(BATCHES, tokens * BATCH, m) * 1e-3
    weight = (torch.randn(m, n) / n**0.5).bfloat16()
    return [(g.bfloat16(), x.bfloat16()) for g, x in zip(sizes, rows, strict=True)], weight


def of_model(model_name: str, layer: str, seed: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """As ``drawn``, of a layer of a real model in bf16, on requests with refusals that the program makes from ``seed``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from warp_ds.data.synthetic import demo_data

    model: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    module = model.get_submodule(layer)
    taken: dict[str, Tensor] = {}

    def take(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        taken["x"] = inputs[0].detach()
        output.register_hook(lambda gradient: taken.update(g=gradient))

    module.register_forward_hook(take)

    texts = [f"{row['prompt']}\n{row['response']}" for row in demo_data(seed)["refusals_fit"][: BATCHES * BATCH]]
    batches = []
    for begin in range(0, len(texts), BATCH):
        given = tokenizer(texts[begin : begin + BATCH], return_tensors="pt", padding=True, padding_side="right")
        seen = given["attention_mask"].bool()
        model(**given, labels=given["input_ids"].masked_fill(~seen, -100)).loss.backward()
        batches.append((taken["g"][seen], taken["x"][seen]))
    return batches, module.weight.detach()


if __name__ == "__main__":
    main()
