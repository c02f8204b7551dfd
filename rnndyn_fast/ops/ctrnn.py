"""``ctrnn``: many continuous-time recurrent networks through a whole sequence, as one op and one autograd node.

``torch.ops.rnndyn.ctrnn`` and ``torch.ops.rnndyn.ctrnn_backward`` are registered with ``torch.library``, so that ``torch.compile`` sees one
node. Outside compilation an ``autograd.Function`` calls the same two ops, because a registered op alone returns zeros under forward-mode
differentiation; forward mode runs the reference. Differentiating the backward pass raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import core, cuda_module, sequence_launches
from rnndyn_fast.ops.ctrnn_launch import activation_codes, backward_on_device
from rnndyn_fast.ops.forward_mode import in_forward_mode
from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.reference.ctrnn import ctrnn as reference_ctrnn
from rnndyn_fast.reference.philox import unit_normals

_NATIVE_DTYPES = (torch.float32, torch.float64)
_LIMIT = 2**32  # of the counters of the noise

_LIBRARY = torch.library.Library("rnndyn", "FRAGMENT")
_LIBRARY.define(
    "ctrnn(Tensor inputs, Tensor w_rec, Tensor b_rec, Tensor w_in, Tensor h0, Tensor alpha, Tensor noise_std, Tensor? seeds, "
    "str[] activations, int stream, int first_trial, bool with_states) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "ctrnn_backward(Tensor? grad_rates, Tensor? grad_states, Tensor inputs, Tensor w_rec, Tensor b_rec, Tensor w_in, Tensor h0, "
    "Tensor alpha, Tensor rates, str[] activations, bool inputs_too) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# ---------------------------------------------------------------- the ops


def _shared(inputs: Tensor) -> Tensor:  # [M, N, T, I]
    """Contiguous; one model's worth where all models share the same memory."""
    return inputs[:1].contiguous() if inputs.shape[0] > 1 and inputs.stride(0) == 0 else inputs.contiguous()


def _forward(
    inputs: Tensor,  # [M, N, T, I]
    w_rec: Tensor,  # [M, H, H]
    b_rec: Tensor,  # [M, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, N, H]
    alpha: Tensor,  # [M]
    noise_std: Tensor,  # [M]
    seeds: Tensor | None,  # [M]
    activations: list[str],
    stream: int,
    first_trial: int,
    with_states: bool,
) -> tuple[Tensor, Tensor]:
    rates, states = _forward_fake(inputs, w_rec, b_rec, w_in, h0, alpha, noise_std, seeds, activations, stream, first_trial, with_states)
    sequence_launches.ctrnn_forward(
        inputs=_shared(inputs),
        w_rec=w_rec.contiguous(),
        b_rec=b_rec.contiguous(),
        w_in=w_in.contiguous(),
        h0=h0.contiguous(),
        alpha=alpha.contiguous(),
        noise_std=noise_std.contiguous(),
        activations=activation_codes(activations, rates.device),
        noise_seeds=None if seeds is None else seeds.contiguous(),
        stream=stream,
        first_trial=first_trial,
        rates=rates,
        states=states if with_states else None,
    )
    return rates, states


def _forward_fake(
    inputs: Tensor,
    w_rec: Tensor,
    b_rec: Tensor,
    w_in: Tensor,
    h0: Tensor,
    alpha: Tensor,
    noise_std: Tensor,
    seeds: Tensor | None,
    activations: list[str],
    stream: int,
    first_trial: int,
    with_states: bool,
) -> tuple[Tensor, Tensor]:
    m, n, t, _ = inputs.shape
    shape = (m, n, t, w_rec.shape[1])
    return inputs.new_empty(shape), inputs.new_empty(shape if with_states else (0,))


def _backward(
    grad_rates: Tensor | None,  # [M, N, T, H]
    grad_states: Tensor | None,  # [M, N, T, H]
    inputs: Tensor,
    w_rec: Tensor,
    b_rec: Tensor,
    w_in: Tensor,
    h0: Tensor,
    alpha: Tensor,
    rates: Tensor,  # [M, N, T, H]
    activations: list[str],
    inputs_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    units, channels = w_rec.shape[1], w_in.shape[1]
    grad_inputs = inputs.new_empty(inputs.shape if inputs_too else (0,))
    grad_weights = w_rec.new_empty(w_rec.shape[0], units + channels + 1, units)
    grad_h0 = h0.new_empty(h0.shape)
    backward = backward_on_device if core.on_device(rates) else sequence_launches.ctrnn_backward
    backward(
        inputs=_shared(inputs),
        w_rec=w_rec.contiguous(),
        w_in=w_in.contiguous(),
        h0=h0.contiguous(),
        alpha=alpha.contiguous(),
        activations=activation_codes(activations, rates.device),
        rates=rates.contiguous(),
        grad_rates=None if grad_rates is None else grad_rates.contiguous(),
        grad_states=None if grad_states is None else grad_states.contiguous(),
        grad_inputs=grad_inputs if inputs_too else None,
        grad_weights=grad_weights,
        grad_h0=grad_h0,
    )
    grad_w_rec, grad_w_in, grad_b_rec = grad_weights.split([units, channels, 1], 1)
    # (an op may not return views of one buffer)
    return grad_inputs, grad_w_rec.clone(), grad_b_rec[:, 0].clone(), grad_w_in.clone(), grad_h0


def _backward_fake(
    grad_rates: Tensor | None,
    grad_states: Tensor | None,
    inputs: Tensor,
    w_rec: Tensor,
    b_rec: Tensor,
    w_in: Tensor,
    h0: Tensor,
    alpha: Tensor,
    rates: Tensor,
    activations: list[str],
    inputs_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_inputs = inputs.new_empty(inputs.shape if inputs_too else (0,))
    # (contiguous, whatever the tensors themselves are)
    new = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (w_rec, b_rec, w_in, h0)]
    return grad_inputs, new[0], new[1], new[2], new[3]


# ---------------------------------------------------------------- autograd


def _refuse_double_backward(*_: Any) -> None:
    raise RuntimeError('the native ctrnn cannot be differentiated twice; use backend="reference" for second derivatives')


def _refuse_values(needs: Sequence[bool]) -> None:
    if any(needs):
        raise RuntimeError('the native ctrnn has no gradient of alpha and noise_std; use backend="reference"')


def _setup_registered(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, w_rec, b_rec, w_in, h0, alpha, _, _, activations, *_ = inputs
    ctx.activations = activations
    ctx.with_states = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, w_rec, b_rec, w_in, h0, alpha, output[0])


def _backward_registered(ctx: Any, grad_rates: Tensor | None, grad_states: Tensor | None) -> tuple[Any, ...]:
    _refuse_values(ctx.needs_input_grad[5:7])
    arguments = (grad_rates, grad_states if ctx.with_states else None, *ctx.saved_tensors, list(ctx.activations), ctx.needs_input_grad[0])
    if grad_rates is None and grad_states is None:
        return (None,) * 12
    run: Any = torch.ops.rnndyn.ctrnn_backward if torch.compiler.is_compiling() else _CtrnnBackward.apply
    grads = run(*arguments)
    return grads[0] if ctx.needs_input_grad[0] else None, *grads[1:], None, None, None, None, None, None, None


class _CtrnnBackward(torch.autograd.Function):
    """The backward op as a node of its own, so that functional transforms see one, and a second derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.rnndyn.ctrnn_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        _refuse_double_backward()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        _refuse_double_backward()


class _Ctrnn(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.rnndyn.ctrnn(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_registered(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return _backward_registered(ctx, *grads)


# ---------------------------------------------------------------- registration


def _one_by_one(op: Any) -> Any:
    """Batching rule of an op: one call per entry."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = [
            op(*(a if d is None or not isinstance(a, Tensor) else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(values) for values in zip(*results, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("ctrnn", _forward, _device)
    _LIBRARY.impl("ctrnn_backward", _backward, _device)
torch.library.register_fake("rnndyn::ctrnn", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("rnndyn::ctrnn_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::ctrnn", _backward_registered, setup_context=_setup_registered, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::ctrnn_backward", _refuse_double_backward, lib=_LIBRARY)
torch.library.register_vmap("rnndyn::ctrnn", _one_by_one(torch.ops.rnndyn.ctrnn), lib=_LIBRARY)
torch.library.register_vmap("rnndyn::ctrnn_backward", _one_by_one(torch.ops.rnndyn.ctrnn_backward), lib=_LIBRARY)


# ---------------------------------------------------------------- the public function


def can_run_ctrnn(inputs: Tensor, raise_error: bool = False) -> bool:  # [M, N, T, I]
    """Whether the native backend takes these inputs: float32 or float64 on the CPU, float32 on a CUDA device.

    Raises:
        ValueError: it does not, and ``raise_error``; the message is the reason.
    """
    reason = core.unavailable
    if reason is None and core.on_device(inputs):
        reason = cuda_module.why_not(inputs, (torch.float32,))
        reason = reason and f"inputs: {reason}"
    elif reason is None and inputs.device.type != "cpu":
        reason = f"inputs are on {inputs.device}, and the native backend runs on the CPU and on CUDA devices"
    elif reason is None and inputs.dtype not in _NATIVE_DTYPES:
        reason = f"inputs have dtype {inputs.dtype}, and the native backend takes float32 and float64"
    if reason is not None and raise_error:
        raise ValueError(f"backend='native': {reason}; backend='reference' takes them")
    return reason is None


def check_model_values(alpha: Tensor, noise_std: Tensor) -> None:  # [M], [M]
    """Raise ``ValueError`` unless alpha lies in (0, 1] and noise_std is finite and not negative."""
    if not bool(((alpha > 0) & (alpha <= 1)).all()):
        raise ValueError(f"alpha: expected values in (0, 1], got {alpha.tolist()}")
    if not bool((torch.isfinite(noise_std) & (noise_std >= 0)).all()):
        raise ValueError(f"noise_std: expected finite values of at least 0, got {noise_std.tolist()}")


def _check_tensor(name: str, value: Tensor, letters: str, sizes: tuple[int | None, ...], like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {letters}, got {type(value).__name__}")
    if value.dim() != len(sizes) or any(s is not None and s != v for s, v in zip(sizes, value.shape, strict=True)):
        wanted = ", ".join("any" if s is None else str(s) for s in sizes)
        raise ValueError(f"{name}: expected {letters} = [{wanted}], got {list(value.shape)}")
    if value.dtype != like.dtype or value.device != like.device:
        raise TypeError(f"{name}: expected {like.dtype} on {like.device} like inputs, got {value.dtype} on {value.device}")


def _check_counter(name: str, value: int, last: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 0 or last >= _LIMIT:
        raise ValueError(f"{name}: expected numbers in [0, 2^32), got {value}{'' if last == value else f' to {last}'}")


def ctrnn(
    inputs: Tensor,  # [M, N, T, I]
    w_rec: Tensor,  # [M, H, H]
    b_rec: Tensor,  # [M, H]
    w_in: Tensor,  # [M, I, H]
    h0: Tensor,  # [M, H] or [M, N, H]
    alpha: Tensor,  # [M]
    noise_std: Tensor,  # [M]
    activations: Sequence[Activation],
    noise_seeds: Sequence[int] | Tensor | None = None,  # [M]
    *,
    stream: int = 0,
    first_trial: int = 0,
    with_states: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Many continuous-time recurrent networks through a sequence.

    .. math:: h_t = (1 - \alpha) h_{t-1} + \alpha\,(f(h_{t-1}) W + b + u_t V + \sigma \xi_t), \quad r_t = f(h_t)

    Args:
        inputs: u [M, N, T, I], float32 or float64 (reference: any float dtype); an expanded model axis is read once.
        w_rec: W [M, H, H]; ``w_rec[m, j, i]`` goes from unit j to unit i (row vectors).
        b_rec, w_in: b [M, H] and V [M, I, H].
        h0: the state before the first step, per model [M, H] or per model and trial [M, N, H].
        alpha: time step over time constant, in (0, 1], [M].
        noise_std: sigma [M], at least 0; inside the leak's bracket.
        activations: f, one per model.
        noise_seeds: seed of each model's noise, or None for none. A number depends on seed, stream, trial, step and unit only:
            ``reference.philox.unit_normals`` draws the same.
        stream: which of the seed's streams; another one gives fresh noise.
        first_trial: number of the first trial, so that a batch may be split.
        with_states: whether the states are wanted too.
        backend: "native", "reference" (plain PyTorch) or None: native where ``can_run_ctrnn`` says so, else the reference with a warning.

    Returns: rates and states (None without ``with_states``) after each step, [M, N, T, H].

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came.

    Differentiable: inputs, w_rec, b_rec, w_in and h0 (alpha and noise_std: reference only). Forward-mode: yes, at the cost of the
    reference. Double backward: raises; use ``backend="reference"``. Deterministic: yes, for any number of threads.
    Memory: rates [M, N, T, H] (they are all that the backward pass keeps), and states if wanted.

    Source: Murray, arXiv 2310.07908.

    >>> w = torch.zeros(1, 4, 4)
    >>> rates, _ = ctrnn(torch.ones(1, 2, 3, 1), w, w[0, :1], torch.ones(1, 1, 4), w[0, :1], torch.ones(1), torch.zeros(1),
    ...                  [Activation.TANH])
    >>> rates.shape
    torch.Size([1, 2, 3, 4])
    """
    _check_tensor("inputs", inputs, "[M, N, T, I]", (None,) * 4, inputs)
    if not inputs.is_floating_point():
        raise TypeError(f"inputs: expected a floating-point tensor, got {inputs.dtype}")
    m, n, t, i = inputs.shape
    if min(m, n, t, i) < 1:
        raise ValueError(f"inputs: expected [M, N, T, I] of at least 1 each, got {list(inputs.shape)}")
    _check_tensor("b_rec", b_rec, "[M, H]", (m, None), inputs)
    h = b_rec.shape[1]
    if h < 1:
        raise ValueError("b_rec: expected at least one unit, got [M, H] with H = 0")
    _check_tensor("w_rec", w_rec, "[M, H, H]", (m, h, h), inputs)
    _check_tensor("w_in", w_in, "[M, I, H]", (m, i, h), inputs)
    _check_tensor("alpha", alpha, "[M]", (m,), inputs)
    _check_tensor("noise_std", noise_std, "[M]", (m,), inputs)
    per_trial = isinstance(h0, Tensor) and h0.dim() == 3
    _check_tensor("h0", h0, "[M, N, H]" if per_trial else "[M, H]", (m, n, h) if per_trial else (m, h), inputs)
    if len(activations) != m or not all(isinstance(a, Activation) for a in activations):
        raise ValueError(f"activations: expected {m} of Activation, one per model, got {list(activations)}")
    if backend not in (None, "native", "reference"):
        raise ValueError(f'backend: expected "native", "reference" or None, got {backend!r}')
    _check_counter("stream", stream, stream)
    _check_counter("first_trial", first_trial, first_trial + n - 1)
    # (Tracing cannot branch on values, and nothing may wait for the device while a CUDA graph is captured.)
    if not torch.compiler.is_compiling() and not (inputs.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        check_model_values(alpha, noise_std)
    seeds = None
    if noise_seeds is not None:
        seeds = noise_seeds if isinstance(noise_seeds, Tensor) else torch.tensor(list(noise_seeds), dtype=torch.int64)
        if tuple(seeds.shape) != (m,) or seeds.dtype != torch.int64:
            raise ValueError(f"noise_seeds: expected [M] = [{m}] of int64, got {list(seeds.shape)} of {seeds.dtype}")
        seeds = seeds.to(inputs.device)
    states0 = h0 if per_trial else h0[:, None].expand(m, n, h)
    if backend is None and not can_run_ctrnn(inputs):
        try:
            can_run_ctrnn(inputs, raise_error=True)
        except ValueError as reason:
            warnings.warn(f"running the slow plain PyTorch ctrnn: {reason}", stacklevel=2)
        backend = "reference"
    elif backend == "native":
        can_run_ctrnn(inputs, raise_error=True)
    if backend == "reference" or in_forward_mode([inputs, w_rec, b_rec, w_in, h0, alpha, noise_std]):
        noise = None
        if seeds is not None:
            noise = unit_normals(seeds, n, t, h, stream=stream, first_trial=first_trial, dtype=inputs.dtype)
        rates, states = reference_ctrnn(inputs, w_rec, b_rec, w_in, states0, alpha, noise_std, activations, noise)
        return rates, states if with_states else None
    names = [a.value for a in activations]
    arguments = (inputs, w_rec, b_rec, w_in, states0, alpha, noise_std, seeds, names, stream, first_trial, with_states)
    run: Any = torch.ops.rnndyn.ctrnn if torch.compiler.is_compiling() else _Ctrnn.apply
    rates, states = run(*arguments)
    return rates, states if with_states else None
