"""The teacher's weights, merged from the policy's own checkpoints.

    teacher = base + merge(s_1 B_1 A_1, ..., s_K B_K A_K)     per weight matrix

The merge is on the products in weight space (TIES or the weighted mean), never on A and B apart.
Two ways to the same weights:

    merge_teacher      from a History: any weighting, any history_max; time grows with K
    StreamingTeacher   from running sums: history_max = 0 with sma or ema; time does not grow with
                       K, memory is four fp32 numbers per weight (one for linear)

Left out: putting the weights into a model (model.py), scoring with them (teacher.py), and adapters
from anywhere (merge.py).
"""

from torch import Tensor

from turbo.history import Factors, History, Snapshot, check_finite_factors, compute_thresholds
from turbo.kernels.checks import check_density
from turbo.kernels.nf4 import (
    Nf4Matrix,
    copy_nf4,
    quantize_nf4,
    ties_merge_lora_nf4,
)
from turbo.kernels.ties import (
    StreamingLinear,
    StreamingTies,
    linear_merge_lora,
    ties_merge_lora,
)

METHODS = ("ties", "linear")


def merge_teacher(
    base: dict[str, Tensor],  # module name -> pristine weight [out, in]
    history: History,
    *,
    method: str = "ties",
    weighting: str = "sma",
    alpha: float = 0.5,
) -> dict[str, Tensor]:
    """The merged dense weight of every module, on base's devices and in its dtypes."""
    _check_method(method)
    weights = history.weights(weighting, alpha)
    entries = history.entries
    _check_names(base, entries[-1].factors)
    if method == "ties" and history.density is None:
        raise ValueError("history: expected a density to trim at for method='ties', got None")
    return {
        name: merge_matrix(matrix, name, entries, weights, method=method)
        for name, matrix in base.items()
    }


def merge_matrix(
    base: Tensor,  # [out, in]
    name: str,
    entries: list[Snapshot],  # K
    weights: list[float],  # K
    *,
    method: str = "ties",
    out: Tensor | Nf4Matrix | None = None,
) -> Tensor | Nf4Matrix:
    """One merged matrix, dense or in NF4 like `out`; only its own factors are uploaded."""
    scales = [entry.scale for entry in entries]
    lora_a, lora_b = (
        [entry.factors[name][side].to(base.device, non_blocking=True) for entry in entries]
        for side in (0, 1)
    )
    options = dict(check_finite=False)  # the history has looked at every checkpoint
    if method == "ties":
        thresholds = [entry.thresholds[name] for entry in entries]
        merge = ties_merge_lora_nf4 if isinstance(out, Nf4Matrix) else ties_merge_lora
        return merge(base, lora_a, lora_b, scales, weights, thresholds, out=out, **options)
    if isinstance(out, Nf4Matrix):  # of one matrix there is room for a dense copy
        merged = linear_merge_lora(base, lora_a, lora_b, scales, weights, **options)
        return copy_nf4(quantize_nf4(merged), out)
    return linear_merge_lora(base, lora_a, lora_b, scales, weights, out=out, **options)


class StreamingTeacher:
    """A teacher over all checkpoints so far that stores none of them.

    Equal to `merge_teacher` on a history with history_max = 0, to rounding.
    """

    def __init__(
        self,
        base: dict[str, Tensor],
        *,
        method: str = "ties",
        weighting: str = "sma",
        alpha: float = 0.5,
        density: float = 0.8,
    ):
        _check_method(method)
        check_density(density)
        self.base, self.density = base, density
        accumulator = StreamingTies if method == "ties" else StreamingLinear
        self.sums = accumulator(weighting, alpha)

    def push(self, factors: Factors, scale: float) -> None:
        """Add a checkpoint."""
        _check_names(self.base, factors)
        check_finite_factors(factors)
        factors = {name: (a.detach(), b.detach()) for name, (a, b) in factors.items()}
        if isinstance(self.sums, StreamingLinear):
            for name, (a, b) in factors.items():
                self.sums.push_lora(name, a, b, scale, check_finite=False)
            return
        thresholds = compute_thresholds(factors, scale, self.density)
        for name, (a, b) in factors.items():
            self.sums.push_lora(name, a, b, scale, thresholds[name], check_finite=False)

    def weights(self) -> dict[str, Tensor]:
        """The merged dense weight of every module; raises ValueError before the first push."""
        return {name: self.sums.merge(name, matrix) for name, matrix in self.base.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The running sums (not the base), enough for a resume with the same bits."""
        return self.sums.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums.load_state_dict(state)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")


def _check_names(base: dict[str, Tensor], factors: Factors) -> None:
    if base.keys() != factors.keys():
        missing, extra = sorted(factors.keys() - base.keys()), sorted(base.keys() - factors.keys())
        raise ValueError(
            f"base: expected the matrices that have factors, got {missing} missing, {extra} extra"
        )
