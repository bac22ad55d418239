"""Repairs against general solvers, closed forms and plain gradients, on small random problems."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.anatomy import anatomy_of
from secateur.engine.host.build import describe_skeleton
from secateur.engine.probes import CrossGram, DenseMean, Evidence, Gram, InputMoments, paired
from secateur.errors import SecateurError
from secateur.methods.base import Keep, MatrixSite, Part
from secateur.methods.fitting import fitted
from secateur.methods.joint.sparsegpt import SparseGPT
from secateur.methods.mending import sublayer
from secateur.methods.repairs import REPAIRS
from secateur.methods.repairs.least_squares import LeastSquares
from secateur.methods.repairs.local_reconstruction import LocalReconstruction
from secateur.methods.repairs.mean_bias import MeanBias
from secateur.parts import parts_of
from secateur.step import Step
from whole_toys import make


def site(weight: Tensor, name: str = "w") -> MatrixSite:
    return MatrixSite(name, weight, "ffn", 0, 1, torch.Generator())


def seen(x: Tensor, dense: Tensor | None = None) -> Evidence:
    """What the probes gather of these inputs [tokens, in], in two batches."""
    probes: dict[Any, Any] = {Gram: Gram(), InputMoments: InputMoments()}
    if dense is not None:
        probes |= {CrossGram: CrossGram(), DenseMean: DenseMean()}
    half = len(x) // 2
    for at in (slice(0, half), slice(half, None)):
        for probe in probes.values():
            probe.update(x[at], None, *([dense[at]] if probe.kind == "paired" and dense is not None else []))
    return Evidence("w", probes)


def problem(rows: int = 7, columns: int = 12, tokens: int = 90, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix, correlated inputs with a mean, the same inputs disturbed, and a mask that differs in every row."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g)
    dense = torch.randn(tokens, columns, generator=g) @ mix + torch.randn(columns, generator=g)
    x = dense + 0.8 * torch.randn(tokens, columns, generator=g) @ mix
    mask = torch.rand(rows, columns, generator=g) < torch.linspace(0.2, 0.9, rows).unsqueeze(1)
    return torch.randn(rows, columns, generator=g), x, dense, mask


def solved(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """min |X w - y|^2 on each row's survivors, by a general solver in fp64; y [tokens, out]."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, keep in enumerate(mask):
        out[i, keep] = torch.linalg.lstsq(x.double()[:, keep], y.double()[:, i : i + 1]).solution.squeeze(1)
    return out


def ridge(x: Tensor, y: Tensor, prior: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """The same problem with ``shift * |w - prior|^2`` as further rows of data, for each row of ``prior`` [out, in]."""
    eye = shift**0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.cat([x.double(), eye]), torch.cat([y.double(), shift**0.5 * prior.double().T])


def shift_of(x: Tensor, damping: float) -> float:
    return damping * float((x.double() ** 2).sum(0).mean())


@pytest.mark.parametrize("seed", range(3))
def test_least_squares_is_a_general_solver_row_by_row(seed: int) -> None:
    w, x, _, mask = problem(seed=seed)
    got = LeastSquares(damping=0.0).mend(site(w), seen(x), Keep(mask)).weight
    assert got is not None
    torch.testing.assert_close(got.double(), solved(x, x @ w.T, mask), rtol=1e-3, atol=1e-4)
    assert not got[~mask].any()
    damped = LeastSquares(damping=0.1).mend(site(w), seen(x), Keep(mask)).weight
    assert damped is not None
    wide, aim = ridge(x, x @ w.T, w, shift_of(x, 0.1))
    torch.testing.assert_close(damped.double(), solved(wide, aim, mask), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_least_squares_never_fits_worse_than_what_it_was_given(seed: int, damping: float) -> None:
    w, x, _, mask = problem(seed=seed, tokens=30)
    gpt = SparseGPT(damping=0.001).prune(site(w), seen(x), 40)
    for keep in (Keep(mask), gpt):
        now = (w if keep.weight is None else keep.weight) * keep.mask
        new = LeastSquares(damping=damping).mend(site(w), seen(x), keep).weight
        assert new is not None
        before, after = (((v - w) @ x.T).double().square().sum(1) for v in (now, new))
        assert bool((after <= before * (1 + 1e-4) + 1e-6).all())
        assert not new[~keep.mask].any()


def test_least_squares_of_a_cut_is_one_solve_for_all_rows() -> None:
    w, x, _, _ = problem()
    mask = torch.zeros_like(w, dtype=torch.bool)
    mask[:, [0, 3, 4, 8, 11]] = True
    got = LeastSquares(damping=0.0).mend(site(w), seen(x), Keep(mask)).weight
    assert got is not None
    want = torch.linalg.lstsq(x[:, mask[0]].double(), (x @ w.T).double()).solution.T
    torch.testing.assert_close(got[:, mask[0]].double(), want, rtol=1e-3, atol=1e-4)


def test_inputs_that_never_fire_and_experts_that_no_token_reaches() -> None:
    w, x, _, mask = problem()
    x[:, 2] = 0
    got = LeastSquares().mend(site(w), seen(x), Keep(mask)).weight
    assert got is not None and torch.isfinite(got).all()
    none = LeastSquares().mend(site(w), seen(x[:0]), Keep(mask)).weight
    assert none is not None
    torch.testing.assert_close(none, w * mask)
    bias = MeanBias().mend(site(w), seen(x[:0]), Keep(mask)).bias
    assert bias is not None and torch.equal(bias, torch.zeros(len(w)))


def test_a_mix_aims_at_the_dense_outputs_from_the_pruned_inputs() -> None:
    w, x, dense, mask = problem(seed=5)
    evidence, damping = seen(x, dense), 0.03
    wide, aim = ridge(x, dense @ w.T, w, shift_of(x, damping))
    everything = torch.ones_like(mask)
    (target,) = fitted([site(w)], [evidence], damping)
    torch.testing.assert_close(target.weight.double(), solved(wide, aim, everything), rtol=1e-3, atol=1e-4)
    got = LeastSquares(damping=damping).mend(site(w), evidence, Keep(mask)).weight
    assert got is not None
    torch.testing.assert_close(got.double(), solved(wide, aim, mask), rtol=1e-3, atol=1e-4)
    alone = LeastSquares(damping=damping).mend(site(w), seen(x), Keep(mask)).weight
    assert alone is not None
    mixed, plain = (float((x @ v.T - dense @ w.T).square().sum()) for v in (got, alone))
    assert mixed < 0.97 * plain


def test_matrices_of_one_input_are_aimed_together_as_alone() -> None:
    w, x, dense, _ = problem(seed=6)
    evidence = seen(x, dense)
    both = fitted([site(w[:3]), site(w[3:])], [evidence, evidence])
    torch.testing.assert_close(torch.cat([s.weight for s in both]), fitted([site(w)], [evidence])[0].weight)
    only = site(w)
    assert fitted([only], [seen(x)])[0] is only


def test_equal_streams_aim_at_the_weights_themselves() -> None:
    w, x, _, _ = problem(seed=7)
    torch.testing.assert_close(fitted([site(w)], [seen(x, x)])[0].weight, w, rtol=1e-3, atol=1e-4)


def test_mean_bias_is_the_best_constant() -> None:
    w, x, _, mask = problem(seed=2)
    bias = MeanBias().mend(site(w), seen(x), Keep(mask)).bias
    assert bias is not None
    removed = x.double() @ (w * ~mask).double().T
    torch.testing.assert_close(bias.double(), removed.mean(0), rtol=1e-4, atol=1e-5)
    off = x @ (w * mask).T + bias - x @ w.T  # what is left has no mean, so no other bias does better
    torch.testing.assert_close(off.mean(0), torch.zeros(len(w)), rtol=0, atol=1e-4)
    moved = torch.randn_like(w)
    bias = MeanBias().mend(site(w), seen(x), Keep(mask, moved)).bias
    assert bias is not None
    torch.testing.assert_close(bias, (x @ w.T - x @ (moved * mask).T).mean(0), rtol=1e-3, atol=1e-4)


def test_mean_bias_of_a_mix_keeps_the_dense_models_means() -> None:
    w, x, dense, mask = problem(seed=3)
    dense = dense + 1.0
    bias = MeanBias().mend(site(w), seen(x, dense), Keep(mask)).bias
    assert bias is not None
    torch.testing.assert_close((x @ (w * mask).T + bias).mean(0), (dense @ w.T).mean(0), rtol=1e-3, atol=1e-4)


def two_layers(seed: int = 0) -> tuple[Part, dict[str, Tensor]]:
    """y = B tanh(A x) with half of both gone, against what it gave when whole."""
    g = torch.Generator().manual_seed(seed)
    whole = {"a": torch.randn(20, 10, generator=g), "b": torch.randn(6, 20, generator=g)}
    xs = [torch.randn(3, 5, 10, generator=g) for _ in range(6)]

    def run(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ w["a"].T) @ w["b"].T

    targets = [run(whole, x) for x in xs]
    keeps = {name: torch.rand(w.shape, generator=g) < 0.5 for name, w in whole.items()}
    weights = {name: w.masked_fill(~keeps[name], 0) for name, w in whole.items()}
    part = Part("p", weights, keeps, len(xs), lambda i: run(weights, xs[i]), lambda i: targets[i], g)
    return part, {name: w.clone() for name, w in weights.items()}


def relative_by_hand(answer: Tensor, target: Tensor) -> float:
    """Mean over tokens of the squared error relative to the token's answer, the median one's added."""
    y, t = (v.detach().double().numpy().reshape(-1, v.shape[-1]) for v in (answer, target))
    sizes = (t**2).sum(1)
    return float(np.mean(((y - t) ** 2).sum(1) / (sizes + np.sort(sizes)[(len(sizes) - 1) // 2])))


def test_local_reconstruction_lowers_the_error_and_keeps_zeros() -> None:
    part, old = two_layers()
    before, after = LocalReconstruction(passes=30, rate=0.05).fit(part)
    errors = [relative_by_hand(part.output(i), part.target(i)) for i in range(6)]
    assert after == pytest.approx(np.mean(errors), rel=1e-4)
    assert after < 0.6 * before
    for name, w in part.weights.items():
        assert torch.equal(w[~part.keeps[name]].view(torch.int32), torch.zeros(int((~part.keeps[name]).sum())).int())
        assert not torch.equal(w, old[name]) and w.grad is None and not w.requires_grad


@pytest.mark.parametrize(("windows", "steps"), [(1, 1.0), (2, 1.5)])
def test_steps_are_a_share_of_the_survivors_and_decay(windows: int, steps: float) -> None:
    """Far from a target in one direction every step of Adam is as long as its rate; the second of two has half."""
    g = torch.Generator().manual_seed(0)
    keep = torch.rand(4, 6, generator=g) < 0.5
    w = 1e-3 * torch.randn(4, 6, generator=g).masked_fill(~keep, 0)
    old, far = w.clone(), torch.ones(1, 1, 24)
    part = Part("p", {"w": w}, {"w": keep}, windows, lambda i: w.reshape(1, 1, 24), lambda i: far, g)
    LocalReconstruction(passes=1, rate=0.02, products="walk").fit(part)
    want = steps * 0.02 * float(old[keep].double().square().mean().sqrt())
    torch.testing.assert_close((w - old)[keep], torch.full((int(keep.sum()),), want), rtol=1e-3, atol=0)


def test_steps_that_would_change_nothing_are_not_taken() -> None:
    """Behind 0.936 of a cosine there is a hundredth of its height, and a 2,000th of its area."""
    part, called = two_layers()[0], list[int]()
    counted = replace(part, output=lambda i: (called.append(i), part.output(i))[1])
    LocalReconstruction(passes=16).fit(counted)
    assert len(called) == 90 + 2 * 6  # of 96 steps, and the witnesses before and after


def test_a_fit_that_ends_worse_is_undone() -> None:
    """Nearly right weights and long steps."""
    part, _ = two_layers(seed=1)
    LocalReconstruction(passes=60, rate=0.05).fit(part)
    old = {name: w.clone() for name, w in part.weights.items()}
    before, after = LocalReconstruction(passes=1, rate=1.0).fit(part)
    assert before == after
    assert all(torch.equal(w, old[name]) for name, w in part.weights.items())


def test_products_in_bf16_lead_to_nearly_the_same_fit() -> None:
    """On modules as the host's, not on the toy's own tensors: what is rounded is what autocast rounds."""
    found = {}
    for products in ("walk", "bf16"):
        part, _ = two_layers(3)
        found[products] = LocalReconstruction(passes=20, rate=0.05, products=products).fit(part)[1]
        assert all(w.dtype == torch.float32 for w in part.weights.values())
    assert found["bf16"] != found["walk"] and found["bf16"] == pytest.approx(found["walk"], rel=0.05)


def test_the_same_fit_twice_gives_the_same_bits() -> None:
    (a, _), (b, _) = two_layers(2), two_layers(2)
    assert LocalReconstruction().fit(a) == LocalReconstruction().fit(b)
    assert all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


@pytest.mark.parametrize(
    ("family", "attention", "ffn"),
    [
        ("llama", "self_attn", "mlp"),
        ("gpt2", "attn", "mlp"),
        ("mixtral", "self_attn", "mlp"),  # with its router, not the experts alone
        ("falcon", "self_attention", "mlp"),
        ("opt", "self_attn", ""),  # fc1 and fc2 lie in the layer itself
        ("bert", "attention", ""),
    ],
)
def test_a_sub_layer_is_the_module_that_holds_its_matrices(family: str, attention: str, ffn: str) -> None:
    block = anatomy_of(describe_skeleton(make(family))).blocks[0]
    assert (sublayer(block, "attention"), sublayer(block, "ffn")) == (attention, ffn)


def test_paired_statistics_follow_their_own() -> None:
    assert paired((Gram, InputMoments)) == (Gram, CrossGram, InputMoments, DenseMean)
    step = Step("weight", score="wanda", keep=0.5, repair="least_squares", fit_on="mix")
    assert {p.__name__ for p in parts_of(step).needs} == {"InputNorm", "Gram", "CrossGram"}
    joint = Step("weight", method="sparsegpt", keep=0.5, repair="mean_bias", fit_on="mix")
    assert {p.__name__ for p in parts_of(joint).needs} == {"Gram", "CrossGram", "InputMoments", "DenseMean"}
    assert parts_of(joint).needs_of(choosing=False, fitting=False) == ()


@pytest.mark.parametrize(
    "words",
    [
        {"space": "weight", "repair": "least_squarez"},
        {"space": "weight", "repair": "least_squares:dampin=1"},
        {"space": "weight", "repair": "least_squares:damping=-1"},
        {"space": "weight", "repair": "local_reconstruction:passes=0"},
        {"space": "weight", "repair": "local_reconstruction:rate=2"},
        {"space": "weight", "repair": "block_reconstruction:products=int8"},
        {"space": "layer", "repair": "least_squares"},
        {"space": "expert", "repair": "mean_bias"},
        {"space": "weight", "fit_on": "both"},
        {"space": "weight", "fit_on": "mix"},
        {"space": "weight", "repair": "least_squares", "fit_on": "mix:share=0"},
        {"space": "weight", "repair": "local_reconstruction", "fit_on": "mix:share=0.5"},
        {"space": "weight", "repair": "least_squares", "fit_on": "mix:share=2"},
        {"space": "weight", "repair": "least_squares", "fit_on": "pruned:share=0.5"},
        {"space": "weight", "score": None, "method": "dsnot", "fit_on": "mix"},
        {"space": "weight", "score": "magnitude", "fit_on": "dense"},
        {"space": "layer", "fit_on": "dense"},
    ],
)
def test_what_makes_no_sense_is_refused_with_what_works(words: dict[str, Any]) -> None:
    with pytest.raises(SecateurError) as refused:
        parts_of(Step(**{"score": "wanda", "keep": 0.5, **words}))
    assert refused.value.works


def test_every_repair_says_what_it_is() -> None:
    for name, cls in REPAIRS.items():
        assert cls.__doc__ and cls().spaces, name
