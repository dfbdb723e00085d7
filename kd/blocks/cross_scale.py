"""The settings of ScaleKD's cross-scale assistant, and the attention that they ask for at each level (CVPR 2023,
section 3.2)."""

from dataclasses import dataclass
from typing import Literal

from kd.blocks.cross_attention import CrossAttention, Roles


@dataclass(frozen=True, kw_only=True)
class Csa:
    """The cross-scale assistant."""

    heads: int = 8
    rates: tuple[tuple[int, ...], ...] = ((16, 8), (8, 4), (4, 2), (2, 1), (1, 1), (1, 1))
    """Down-sampling rates of keys and values at strides 4, 8, 16, ...; the heads are split evenly over a level's."""
    multi_scale: bool = True
    """Off: all heads use the first of a level's rates (row 2 of the paper's Table 6)."""
    roles: Roles = "eq"
    """`eq`: the student asks, the teacher holds keys and values; `text`: the teacher asks and holds the keys, the
    student the values."""
    head: Literal["shared", "own"] = "shared"
    """`shared`: the student's head answers for CSA too; `own`: a head of the same make, CSA's alone."""
    moves_head: bool = False
    """The detection loss of CSA's pyramid moves the shared head as well, as in LGD, by the student's optimizer."""
    residual: bool = True
    norm: bool = True
    """LayerNorm before the projections of both sides."""
    position: bool = True
    """Add projections of a sine code of the place to queries and keys."""
    locality: float | None = 0.35
    """Where the attention begins: at each cell's own place, so wide (standard deviation in cells of the gathered
    grid); None: random projections, which see the whole image at once and need far longer to find the place."""
    zero_init: bool = True
    """W^O = 0 at first, so that the assistant starts as the student itself."""
    refresh: bool = True
    """Advise after the assistant's step, not with the forward that the step used."""
    start: Literal["always", "gated"] = "always"
    """Learn from the first step on, or only while the method is on."""
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    decay: Literal["decoupled", "coupled"] = "decoupled"
    """`decoupled`: AdamW. `coupled`: the paper's Adam with the decay inside the gradient; queries, keys and values,
    whose gradient is small while W^O is, then shrink to nothing at the full learning rate and CSA stays the student."""

    def __post_init__(self) -> None:
        if self.heads < 1 or not all(rates and min(rates) >= 1 for rates in self.rates):
            raise ValueError(f"csa.heads and csa.rates must be positive, got {self.heads} and {self.rates}")
        if self.moves_head and self.head == "own":
            raise ValueError("csa.moves_head must be false with csa.head 'own': the student's head is not CSA's then")
        if self.zero_init and not self.residual:
            raise ValueError(
                "csa.zero_init without csa.residual starts with an empty pyramid; set csa.zero_init to false too"
            )
        if self.locality is not None and self.locality <= 0:
            raise ValueError(f"csa.locality must be above 0, or null for random projections, got {self.locality}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"csa.learning_rate must be > 0 and csa.weight_decay >= 0, got {self.learning_rate} and "
                f"{self.weight_decay}"
            )


def attention(csa: Csa, student: int, teacher: int, stride: int) -> CrossAttention:
    """A new attention of the student's level of `stride`, for pyramids of these widths."""
    return CrossAttention(
        student,
        teacher,
        csa.heads,
        _rates(csa, stride),
        roles=csa.roles,
        residual=csa.residual,
        zero_init=csa.zero_init,
        position=csa.position,
        locality=csa.locality,
        norm=csa.norm,
    )


def _rates(csa: Csa, stride: int) -> tuple[int, ...]:
    level = stride.bit_length() - 3
    if not 0 <= level < len(csa.rates):
        raise ValueError(f"csa.rates has {len(csa.rates)} entries, for strides 4, 8, ...; none is for stride {stride}")
    return csa.rates[level] if csa.multi_scale else csa.rates[level][:1]
