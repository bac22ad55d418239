"""Every score against its formula, computed another way: token by token, by finite differences, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.anatomy.types import Port, Space
from secateur.engine.probes import (
    BlockOutput,
    Contribution,
    Cosine,
    Evidence,
    Fisher,
    Gradient,
    Gram,
    InputNorm,
    LocalGradient,
    PositionSquares,
    Probe,
    RouterMass,
)
from secateur.errors import SecateurError
from secateur.methods.base import MatrixSite, Score, UnitSite
from secateur.methods.grains import Row, Tile
from secateur.methods.scores import SCORES
from secateur.methods.scores.contribution import Contribution as ContributionScore
from secateur.methods.scores.fisher import FisherScore
from secateur.methods.scores.magnitude import Magnitude
from secateur.methods.scores.output_error import OutputError
from secateur.methods.scores.ria import Ria
from secateur.methods.scores.taylor import Taylor, TaylorVector
from secateur.methods.scores.taylor_block import TaylorBlock
from secateur.methods.scores.wanda import Wanda
from secateur.parts import parts_of
from secateur.step import Step

FFN = Space("ffn", 4, (Port("gate", 0, "write"), Port("up", 0, "write"), Port("down", 1, "read")))


def site(weight: Tensor, name: str = "w") -> MatrixSite:
    return MatrixSite(name, weight, "ffn", 0, 1, torch.Generator())


def heard(probe: Probe, *args: Tensor | None, name: str = "w") -> Evidence:
    probe.update(*args)
    return Evidence(name, {type(probe): probe})


def ffn_site(tensors: dict[str, Tensor], evidence: dict[str, Evidence], space: Space = FFN) -> UnitSite:
    return UnitSite(
        name="layers.0",
        space=space,
        tensors=tensors,
        matrices={t: [site(w, t)] for t, w in tensors.items()},
        evidence=evidence | {t: Evidence(t, {}) for t in tensors if t not in evidence},
        block_evidence=Evidence("layers.0", {}),
        transposed=frozenset(),
        block=0,
        blocks=1,
        generator=torch.Generator(),
    )


def ffn_tensors() -> dict[str, Tensor]:
    return {"gate": torch.randn(4, 3), "up": torch.randn(4, 3), "down": torch.randn(3, 4)}


def test_wanda_token_by_token() -> None:
    w, x = torch.randn(3, 4), torch.randn(7, 4)
    got = SCORES["wanda"]().score(site(w), heard(InputNorm(), x, None))
    for i in range(3):
        for j in range(4):
            want = abs(float(w[i, j])) * np.sqrt(sum(float(t) ** 2 for t in x[:, j]))
            assert float(got[i, j]) == pytest.approx(want, rel=1e-5)


def test_wanda_in_experts_is_router_weighted() -> None:
    w, x, gate = torch.randn(3, 4), torch.randn(7, 4), torch.rand(7)
    got = SCORES["wanda"]().score(site(w), heard(InputNorm(), x, gate))
    want = (
        w.abs() * torch.stack([sum((g * t) ** 2 for g, t in zip(gate, x[:, j], strict=True)) for j in range(4)]).sqrt()
    )
    torch.testing.assert_close(got, want)


def test_wanda_of_neurons_sums_the_columns_of_down() -> None:
    tensors, x = ffn_tensors(), torch.randn(7, 4)
    got = SCORES["wanda"]().units(ffn_site(tensors, {"down": heard(InputNorm(), x, None, name="down")}))
    want = [sum(abs(float(tensors["down"][i, j])) for i in range(3)) * float(x[:, j].norm()) for j in range(4)]
    torch.testing.assert_close(got, torch.tensor(want))


def test_ria_entry_by_entry() -> None:
    w, x = torch.randn(3, 4), torch.randn(7, 4)
    w[:, 2] = 0  # nothing in this column: no share, not a division by zero
    got = Ria(a=0.5).score(site(w), heard(InputNorm(), x, None))
    a = w.abs()
    for i in range(3):
        for j in range(4):
            column = float(a[i, j] / a[:, j].sum()) if j != 2 else 0.0
            want = (column + float(a[i, j] / a[i].sum())) * float(x[:, j].norm()) ** 0.5
            assert float(got[i, j]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", ["wanda", "ria"])
def test_inputs_that_never_fire_come_last(name: str) -> None:
    w, x = torch.randn(3, 4), torch.randn(7, 4)
    x[:, 1] = 0
    got = SCORES[name]().score(site(w), heard(InputNorm(), x, None))
    assert float(got[:, 1].max()) < 1e-6 * float(got[:, [0, 2, 3]].min())


def silence(weight: Tensor) -> Evidence:
    """What is known of an expert that no token reached: sums of nothing."""
    none, still = torch.zeros(0, weight.shape[1]), torch.zeros_like(weight)
    evidence = dict(heard(InputNorm(), none, None)) | dict(heard(Gram(), none, None))
    evidence |= dict(heard(Contribution(), none, None, weight))
    for kind in (Gradient, LocalGradient, Fisher):
        evidence |= dict(heard(kind(), still, weight))
    return Evidence("w", evidence)


@pytest.mark.parametrize(
    "score",
    [
        Wanda(),
        OutputError(),
        OutputError(grain=Tile(2, 2)),
        ContributionScore(),
        Taylor(),
        Taylor(local=True),
        TaylorBlock(),
        TaylorBlock(damping=0),
        TaylorBlock(grain=Tile(2, 2)),
        FisherScore(),
    ],
    ids=str,
)
def test_a_matrix_that_nothing_reached_keeps_its_largest_weights(score: Score) -> None:
    w, grain = 1e-4 * torch.randn(6, 8), getattr(score, "grain", Row())
    got = score.score(site(w), silence(w))
    assert float(got.max()) < 1e-20  # and comes last among those that something reached
    half = grain.units((6, 8)) // 2
    assert torch.equal(grain.select(got, half), grain.select(w.square(), half))


def test_units_that_nothing_reached_rank_by_the_size_of_their_weights() -> None:
    tensors = {n: 1e-4 * w for n, w in ffn_tensors().items()}
    got = TaylorVector().units(ffn_site(tensors, {n: silence(w) for n, w in tensors.items()}))
    sizes = Magnitude().units(ffn_site(tensors, {}))
    assert float(sizes.min()) > 0
    torch.testing.assert_close(got / got.sum(), sizes / sizes.sum())


def test_ria_with_exponent_0_ignores_activations() -> None:
    w = torch.randn(3, 4)
    scores = [Ria(a=0).score(site(w), heard(InputNorm(), torch.randn(7, 4), None)) for _ in range(2)]
    assert torch.equal(*scores)
    with pytest.raises(SecateurError, match="-1"):
        Ria(a=-1)


def test_contribution_token_by_token() -> None:
    w, x = torch.randn(3, 4), torch.randn(7, 4)
    x[2] = 0  # a token that contributes nothing to anything
    got = SCORES["contribution"]().score(site(w), heard(Contribution(), x, None, w))
    want = np.zeros((3, 4))
    for t in range(7):
        for i in range(3):
            parts = [abs(float(x[t, k] * w[i, k])) for k in range(4)]
            for j in range(4):
                want[i, j] += parts[j] / sum(parts) / 7 if sum(parts) else 0.0
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_of_neurons_is_the_norm_of_all_their_weights(p: int) -> None:
    tensors = ffn_tensors()
    got = Magnitude(p=p).units(ffn_site(tensors, {}))
    for j in range(4):
        members = np.concatenate([tensors["gate"][j], tensors["up"][j], tensors["down"][:, j]])
        assert float(got[j]) == pytest.approx(float(np.linalg.norm(members, ord=p)), rel=1e-5)


def test_magnitude_knows_two_norms() -> None:
    assert torch.equal(Magnitude(p=2).score(site(torch.tensor([[-3.0]])), Evidence("w", {})), torch.tensor([[9.0]]))
    with pytest.raises(SecateurError, match=r"received: 3"):
        Magnitude(p=3)


def ffn_loss(t: dict[str, Tensor], x: Tensor) -> Tensor:
    h = torch.tanh(x @ t["gate"].T) * (x @ t["up"].T)
    return (h @ t["down"].T).square().mean()


@pytest.mark.parametrize("local", [False, True])
def test_taylor_is_the_slope_of_the_loss_towards_zero(local: bool) -> None:
    """Scaling one weight (a whole unit) by 1 - t: the loss changes by -t times the signed sum of w g."""
    tensors = {n: w.double() for n, w in ffn_tensors().items()}
    x = torch.randn(7, 3, dtype=torch.float64)
    leaves = {n: w.clone().requires_grad_(True) for n, w in tensors.items()}
    ffn_loss(leaves, x).backward()
    probe = LocalGradient if local else Gradient
    evidence = {n: heard(probe(), leaf.grad, None, name=n) for n, leaf in leaves.items()}
    step = 1e-6

    def slope(scale: dict[str, Tensor]) -> float:
        up = ffn_loss({n: w * (1 - step * scale[n]) for n, w in tensors.items()}, x)
        down = ffn_loss({n: w * (1 + step * scale[n]) for n, w in tensors.items()}, x)
        return float((up - down) / (2 * step))

    none = {n: torch.zeros_like(w) for n, w in tensors.items()}
    element = Taylor(local=local).score(site(tensors["up"], "up"), evidence["up"])
    for i in range(4):
        for j in range(3):
            one = none | {"up": none["up"].index_put((torch.tensor(i), torch.tensor(j)), torch.tensor(1.0).double())}
            assert float(element[i, j]) == pytest.approx(abs(slope(one)), rel=1e-4, abs=1e-8)
    vector = TaylorVector(local=local).units(ffn_site(tensors, evidence))
    summed = Taylor(local=local).units(ffn_site(tensors, evidence))
    for u in range(4):
        whole = {n: w.clone() for n, w in none.items()}
        whole["gate"][u], whole["up"][u], whole["down"][:, u] = 1, 1, 1
        assert float(vector[u]) == pytest.approx(abs(slope(whole)), rel=1e-4, abs=1e-8)
        members = sum(
            float((tensors[n] * leaves[n].grad).abs().movedim(1 if n == "down" else 0, 0)[u].sum()) for n in tensors
        )
        assert float(summed[u]) == pytest.approx(members, rel=1e-5)


def test_activation_norm_of_heads_position_by_position() -> None:
    space = Space("kv_group", 2, (Port("o", 1, "read", width=3),))
    x = torch.randn(5, 4, 6)  # windows, positions, two heads of three
    got = SCORES["activation_norm"]().units(
        ffn_site({"o": torch.randn(6, 6)}, {"o": heard(PositionSquares(), x, name="o")}, space)
    )
    for head in range(2):
        norms = [float(x[:, t, 3 * head : 3 * head + 3].norm()) for t in range(4)]
        assert float(got[head]) == pytest.approx(sum(norms) / 4, rel=1e-5)


def test_activation_norm_gathers_what_its_space_reads() -> None:
    for space, needs in (("ffn", PositionSquares), ("head", PositionSquares), ("layer", BlockOutput)):
        parts = parts_of(Step(space, score="activation_norm", keep=0.5, budget="pooled"))
        assert parts.needs == parts.survey_needs == parts.ranking.needs == (needs,)


def test_activation_norm_needs_somebody_who_reads() -> None:
    space = Space("ffn", 4, (Port("up", 0, "write"),))
    with pytest.raises(SecateurError, match="no matrix reads"):
        SCORES["activation_norm"]().units(ffn_site({"up": torch.randn(4, 3)}, {}, space))


def block_site(probe: Probe, space: Space, *args: Tensor) -> UnitSite:
    out = ffn_site({}, {}, space)
    out.block_evidence = heard(probe, *args)
    return out


def test_layers_by_cosine_and_by_what_they_add() -> None:
    layer = Space("layer", 1, ())
    before, after = torch.randn(9, 6), torch.randn(9, 6)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, after, strict=True)]
    got = SCORES["block_influence"]().units(block_site(Cosine(), layer, before, after))
    assert float(got) == pytest.approx(1 - sum(cosines) / 9, rel=1e-5)
    added = SCORES["activation_norm"]().units(block_site(BlockOutput(), layer, before, after))
    assert float(added) == pytest.approx(float(np.linalg.norm((after - before).numpy(), axis=1).mean()), rel=1e-5)
    same = SCORES["block_influence"]().units(block_site(Cosine(), layer, before, 3 * before))
    assert float(same) == pytest.approx(0, abs=1e-6)


def test_router_mass_adds_up_weights() -> None:
    routed = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.4, 0.6]])
    got = SCORES["router_mass"]().units(block_site(RouterMass(), Space("expert", 3, ()), routed))
    torch.testing.assert_close(got, torch.tensor([0.7, 0.7, 0.6]))


def expert_site(probe: type[Probe], gates: list[Tensor], inputs: list[Tensor]) -> UnitSite:
    space = Space("expert", 2, (Port("router.weight", 0, "write"), Port("experts.down_proj", 0, "write")))
    weight = torch.randn(2, 3, 4)
    out = ffn_site({}, {}, space)
    out.tensors = {"experts.down_proj": weight}
    out.matrices = {"experts.down_proj": [site(weight[e], f"down[{e}]") for e in range(2)]}
    for e, (gate, x) in enumerate(zip(gates, inputs, strict=True)):
        seen = probe()
        if probe is PositionSquares:
            seen.update((x * gate.unsqueeze(1)).unsqueeze(1))
        else:
            seen.update(x, gate)
        out.evidence[f"down[{e}]"] = Evidence(f"down[{e}]", {probe: seen})
    return out


def test_experts_by_the_norm_of_their_weighted_activations() -> None:
    gates, inputs = [torch.rand(5), torch.rand(2)], [torch.randn(5, 4), torch.randn(2, 4)]
    got = SCORES["activation_norm"]().units(expert_site(PositionSquares, gates, inputs))
    for e in range(2):
        total = sum(float(g * v) ** 2 for g, x in zip(gates[e], inputs[e], strict=True) for v in x)
        assert float(got[e]) == pytest.approx(total**0.5, rel=1e-5)


def test_whole_experts_by_wanda_add_up_all_their_weights() -> None:
    gates, inputs = [torch.rand(5), torch.rand(2)], [torch.randn(5, 4), torch.randn(2, 4)]
    own = expert_site(InputNorm, gates, inputs)
    got = SCORES["wanda"]().units(own)
    for e in range(2):
        norm = (inputs[e] * gates[e].unsqueeze(1)).norm(dim=0)
        assert float(got[e]) == pytest.approx(float((own.tensors["experts.down_proj"][e].abs() * norm).sum()), rel=1e-5)
