"""Feed-forward parts as ports: gated or plain, fused or not, and mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.anatomy.look import Look, Unfit
from secateur.anatomy.types import Matrix, Port, Space

FFN_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "d_ff")
MOE_FIELDS = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size", "ffn_hidden_size")
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_top_k", "moe_k", "moe_topk")
ATTRIBUTES = ("intermediate_size", "intermediate_dim", "ffn_dim", "hidden_dim", "moe_intermediate_size", "expert_dim")
CORRECTIONS = ("e_score_correction_bias", "expert_bias", "correction_bias")  # added before the router chooses
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts", "moe_num_experts")


@dataclass(frozen=True)
class Ffn:
    """Names of one feed-forward part, relative to the block.

    Attributes:
        ups: matrices that make the neurons (gate and up, or one).
        down: the matrix that reads them.
        fused: 1, or the number of equal parts stacked in ``ups[0]`` (gate then up).
        fields: config fields that may say the size.
        norm: a norm over the neurons, if there is one.
    """

    ups: tuple[str, ...]
    down: str
    fused: int = 1
    fields: tuple[str, ...] = FFN_FIELDS
    norm: str = ""

    def names(self) -> tuple[str, ...]:
        return (*self.ups, self.down)

    def spaces(self, look: Look) -> tuple[dict[str, Space], dict[str, str]]:
        """The ``ffn`` space of this block."""
        size = look.ins(self.down)
        if any(look.outs(up) != size * self.fused for up in self.ups):
            return {}, {"ffn": f"the outputs of {', '.join(self.ups)} and the inputs of {self.down} differ in number"}
        ports: tuple[Port, ...] = ()
        for up in self.ups:
            for part in range(self.fused):
                ports += look.writes(up, 1, part * size)
        if self.norm and f"{self.norm}.weight" in look.tensors:
            ports += (Port(f"{self.norm}.weight", 0, "norm"),)
        ports += look.reads(self.down)
        owner = self.down.rpartition(".")[0]
        if self.norm and f"{self.norm}.bias" in look.tensors:
            return {}, {"ffn": f"{self.norm} subtracts a mean over all neurons"}
        sizes = look.sizes(owner, dict.fromkeys(ATTRIBUTES, (size, 1)))
        return {"ffn": Space("ffn", size, ports, sizes=sizes, config=look.field(self.fields))}, {}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts held as 3-D stacks.

    Attributes:
        experts: the module that holds the stacks.
        router: the module whose rows are the experts; its outputs are silenced by a mask.
        up, down: names of the stacks; ``up`` holds gate then up when it is twice as wide as ``down`` reads.
        interleaved: gate and up take turns instead.
        refuse: the reason why experts cannot be removed, or "".
    """

    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool = False
    interleaved: bool = False
    fields: tuple[str, ...] = (*MOE_FIELDS, *FFN_FIELDS)
    refuse: str = ""

    def names(self) -> tuple[str, ...]:
        return ()

    def present(self, look: Look) -> bool:
        return all(f"{self.experts}.{n}" in look.tensors for n in (self.up, self.down))

    def stacks(self, look: Look) -> tuple[int, int, int]:
        """Experts, neurons per expert, and how many entries of ``up`` one neuron has (2 if gated).

        Raises:
            Unfit: if the stacks do not fit each other.
        """
        up, down = look.shape(f"{self.experts}.{self.up}"), look.shape(f"{self.experts}.{self.down}")
        outs, ins = (2, 1) if self.transposed else (1, 2)
        size = down[ins]
        if len(up) != 3 or len(down) != 3 or up[0] != down[0] or up[outs] not in (size, 2 * size):
            raise Unfit(f"the stacks {list(up)} and {list(down)} do not fit each other")
        return up[0], size, up[outs] // size

    def spaces(self, look: Look) -> tuple[dict[str, Space], dict[str, str]]:
        """``ffn`` (neurons of each expert) and ``expert`` of this block."""
        try:
            count, size, parts = self.stacks(look)
        except Unfit as unfit:
            return {}, {"ffn": str(unfit), "expert": str(unfit)}
        found = {"ffn": self._ffn(look, count, size, parts)}
        reason = self._refusal(look)
        if not reason:
            found["expert"] = self._expert(look, count)
        return found, {"expert": reason} if reason else {}

    def _ffn(self, look: Look, count: int, size: int, parts: int) -> Space:
        ports: list[Port] = []
        outs, ins = (2, 1) if self.transposed else (1, 2)
        step = parts if self.interleaved else 1
        for leaf, axis in ((self.up, outs), (f"{self.up}_bias", 1)):
            name = f"{self.experts}.{leaf}"
            for part in range(parts) if name in look.tensors else ():
                start = part if self.interleaved else part * size
                ports.append(Port(name, axis, "write", 1, start, step, copy_axis=0))
        ports.append(Port(f"{self.experts}.{self.down}", ins, "read", copy_axis=0))
        sizes = look.sizes(self.experts, dict.fromkeys(ATTRIBUTES, (size, 1)))
        return Space("ffn", size, tuple(ports), copies=count, sizes=sizes, config=look.field(self.fields))

    def _refusal(self, look: Look) -> str:
        if self.refuse:
            return self.refuse
        if (look.number("n_group", "num_expert_group") or 1) > 1:
            return "its router chooses within groups of experts"
        if not look.has(self.router):
            return f"no router was found at {self.router}"
        count, parent = look.shape(f"{self.experts}.{self.up}")[0], self.experts.rpartition(".")[0]
        if look.outs(self.router) != count:
            return f"its router has {look.outs(self.router)} outputs for {count} experts"
        if any(n.startswith(f"{parent}.") and n.endswith("tid2eid") for n in look.tensors):
            return "some layers choose experts by the token's number"
        for name, info in look.tensors.items():
            if name.rpartition(".")[2] in CORRECTIONS and name.startswith(parent) and count not in info.shape:
                return f"{name} does not have one entry per expert"
        return ""

    def _expert(self, look: Look, count: int) -> Space:
        ports = [Port(f"{self.router}.weight", 0, "write")]
        stems = (self.experts, self.router)
        parent = self.experts.rpartition(".")[0]
        for name, info in look.tensors.items():
            owned = any(name.startswith(s + ".") for s in stems)
            if name.startswith(parent + ".") and name.rpartition(".")[2] in CORRECTIONS:
                ports.append(Port(name, info.shape.index(count), "write"))
            elif owned and info.shape[:1] == (count,) and name != f"{self.router}.weight":
                ports.append(Port(name, 0, "write"))
        sizes: dict[str, int] = {}
        for module in {self.experts, self.router, parent, self.router.rpartition(".")[0]}:
            sizes |= look.sizes(module, dict.fromkeys(COUNTS, (count, 1)))
        top = look.attribute(self.router, TOP_K) or look.attribute(parent, TOP_K) or look.number(*TOP_K) or 1
        return Space(
            "expert",
            count,
            tuple(ports),
            sizes=dict(sorted(sizes.items())),
            config=look.field(EXPERT_FIELDS),
            silence=self.router,
            minimum=top,
        )

    def matrices(self, look: Look) -> tuple[Matrix, ...]:
        """The stacks as matrices, one per expert."""
        out = []
        for leaf in (self.up, self.down):
            name = f"{self.experts}.{leaf}"
            count, a, b = look.shape(name)
            shape = (b, a) if self.transposed else (a, b)
            out.append(Matrix(name, self.experts, shape, self.transposed, count, "ffn"))
        return tuple(out)
