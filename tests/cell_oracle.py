"""The published cells in float64 NumPy, written from the published equations and option names alone; nothing of the package is used.

Layouts are the published ones: maps [N, H, W, C], dense kernels [kh, kw, in, out], depthwise kernels [kh, kw, C, 1], variables by their
published names within the cell's scope. Complex numbers pass through, so that derivatives follow from complex steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray


def _where(condition: Array, a: Array, b: Array) -> Array:
    return np.where(condition, a, b)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda v: v,
    "relu": lambda v: _where(v.real > 0, v, 0 * v),
    "elu": lambda v: _where(v.real > 0, v, np.exp(_where(v.real > 0, 0 * v, v)) - 1),
    "tanh": np.tanh,
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
}


def same(x: Array, kernel: Array) -> Array:
    """Cross-correlation with zeros around: of an odd total of padding the larger half comes after. kernel [kh, kw, in, out]."""
    n, h, w, _ = x.shape
    kh, kw = kernel.shape[:2]
    top, left = (kh - 1) // 2, (kw - 1) // 2
    padded = np.zeros((n, h + kh - 1, w + kw - 1, x.shape[3]), x.dtype)
    padded[:, top : top + h, left : left + w] = x
    total = np.zeros((n, h, w, kernel.shape[3]), np.result_type(x, kernel))
    for i in range(kh):
        for j in range(kw):
            total = total + padded[:, i : i + h, j : j + w] @ kernel[i, j]
    return total


def depthwise(x: Array, kernel: Array) -> Array:
    """Each channel by itself. kernel [kh, kw, C, 1]."""
    return np.concatenate([same(x[..., c : c + 1], kernel[:, :, c : c + 1]) for c in range(x.shape[3])], 3)


def layer_norm(v: Array, gamma: Array, beta: Array) -> Array:
    """Over height, width and channels of a sample; affine per channel."""
    mean = v.mean((1, 2, 3), keepdims=True)
    variance = ((v - mean) ** 2).mean((1, 2, 3), keepdims=True)
    return gamma * (v - mean) / np.sqrt(variance + 1e-12) + beta


class Variables:
    """Variables by name: made on first use (with published shapes), read afterwards, so that the equations alone say which there are."""

    def __init__(self, seed: int, given: Mapping[str, Array] | None = None) -> None:
        self.rng, self.values, self.fixed = np.random.default_rng(seed), dict(given or {}), given is not None

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self.values:
            assert not self.fixed, name
            fan = np.prod(shape[:-1]) if len(shape) == 4 else 4
            self.values[name] = self.rng.normal(size=shape) * (0.8 / np.sqrt(fan)) + (1.0 if name.endswith("gamma") else 0.0)
        assert self.values[name].shape == shape, (name, shape, self.values[name].shape)
        return self.values[name]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


DEFAULTS: dict[str, Any] = {
    "in_out_filter_size": [3, 3], "cell_tau_filter_size": None, "feedback_filter_size": [3, 3], "feedback_entry": "out",
    "tau_nonlinearity": "tanh", "gate_nonlinearity": "tanh", "tau_bias": 0.0, "gate_bias": 0.0, "tau_multiplier": -1.0,
    "gate_multiplier": -1.0, "tau_offset": 1.0, "gate_offset": 1.0, "input_activation": "identity", "feedback_activation": "identity",
    "cell_activation": "elu", "out_activation": "elu",
}  # fmt: skip


class Reciprocal:
    """The reciprocal gated cell of one form; every switch that is left out is off."""

    def __init__(self, config: Mapping[str, Any], form: str, variables: Variables) -> None:
        self.config, self.v, self.median = {**DEFAULTS, **config}, variables, form == "median"
        self.has_cell = _pair(config["gate_filter_size"]) != (0, 0)

    def __getitem__(self, name: str) -> Any:
        return self.config.get(name, False)

    def dense(self, x: Array, size: tuple[int, int], out: int, name: str, *, bias: bool, cut: bool) -> Array:
        """``name``: with "/" a scope, else the stem of <name>_weights and <name>_bias."""
        h, w = (min(k, n) for k, n in zip(size, x.shape[1:3], strict=True)) if cut else size
        join = "/" if name.endswith("/") else "_"
        stem = name.rstrip("/")
        y = same(x, self.v.get(f"{stem}{join}weights", (h, w, x.shape[3], out)))
        return y + self.v.get(f"{stem}{join}bias", (out,)) if bias else y

    def separable(self, x: Array, size: tuple[int, int], out: int, scope: str, *, bias: bool = True) -> Array:
        h, w = (min(k, n) for k, n in zip(size, x.shape[1:3], strict=True))
        if self["ds_repeat"]:
            x = FUNCTIONS["elu"](depthwise(x, self.v.get(f"{scope}/depthwise_weights_0", (h, w, x.shape[3], 1))))
        y = depthwise(x, self.v.get(f"{scope}/depthwise_weights", (h, w, x.shape[3], 1)))
        y = same(y, self.v.get(f"{scope}/pointwise_weights", (1, 1, x.shape[3], out)))
        return y + self.v.get(f"{scope}/bias", (out,)) if bias else y

    def shallow_conv(self, x: Array, size: tuple[int, int], out: int, scope: str, separable: bool) -> Array:
        if separable:
            return self.separable(x, size, out, scope)
        return self.dense(x, size, out, f"{scope}/", bias=False, cut=True)

    def gain(self, kind: str, x: Array) -> Array:
        return self[f"{kind}_offset"] + self[f"{kind}_multiplier"] * FUNCTIONS[self[f"{kind}_nonlinearity"]](x)

    def feedback(self, f: Array, out: int, entry: str) -> Array:
        size = _pair(self["feedback_filter_size"])
        if self["feedback_depth_separable"]:
            y = self.separable(f, size, out, f"{entry}/feedback")
        elif self.median:
            y = self.dense(f, size, out, f"{entry}/feedback_to_{entry}", bias=True, cut=False)
        else:
            y = self.dense(f, size, out, f"{entry}/feedback/", bias=False, cut=True)
        if entry == "cell" and not self.median:
            y = y + f
        return FUNCTIONS[self["feedback_activation"]](y)

    def normed(self, v: Array, half: str) -> Array:
        if not self["layer_norm"]:
            return v
        scope = f"{half}/layer_norm" if self.median else f"{half}/{half}_layer_norm"
        return layer_norm(v, self.v.get(f"{scope}/gamma", v.shape[-1:]), self.v.get(f"{scope}/beta", v.shape[-1:]))

    def step(self, x: Array, state: Array, r: Array | None, f: Array | None) -> tuple[Array, Array]:
        cell_depth, depth = self["cell_depth"], self["out_depth"]
        c, o = (state[..., :cell_depth], state[..., cell_depth:]) if self.has_cell else (None, state)
        if f is not None and self["feedback_entry"] == "input":
            x = x + self.feedback(f, x.shape[3], "input")
        x = FUNCTIONS[self["input_activation"]](x)
        new_c = self.cell(x, c, o, r, f) if c is not None else None
        out = self.out(x, c, o, r, f, depth)
        return out, out if new_c is None else np.concatenate([new_c, out], 3)

    def cell(self, x: Array, c: Array, o: Array, r: Array | None, f: Array | None) -> Array:
        depth = self["cell_depth"]
        ff, gate = _pair(self["ff_filter_size"]), _pair(self["gate_filter_size"])
        tau = _pair(self["cell_tau_filter_size"] or self["tau_filter_size"])
        drive = np.zeros_like(c)
        for on, source, dense, scope in (
            (self["cell_residual"], r, "cell/residual_to_cell", "cell/res_to_cell"),
            (self["input_to_cell"], x, "cell/input_to_cell", "cell/input_to_cell"),
        ):
            if on:
                assert source is not None
                if not self.median:
                    drive = drive + self.shallow_conv(source, ff, depth, scope, self["ff_depth_separable"])
                elif self["ff_depth_separable"]:
                    drive = drive + self.separable(source, ff, depth, scope)
                else:
                    drive = drive + self.dense(source, ff, depth, dense, bias=True, cut=False)
        if f is not None and self["feedback_entry"] == "cell":
            drive = drive + self.feedback(f, depth, "cell")
        if not self.median:
            t = self.shallow_conv(c, tau, depth, "cell/tau", self["tau_depth_separable"])
            g = self.shallow_conv(o, gate, depth, "cell/gate", self["gate_depth_separable"])
        else:
            if self["tau_depth_separable"]:
                t = self.separable(c, tau, depth, "cell/tau")
            else:
                t = self.dense(c, tau, depth, "cell/cell_to_cell", bias=True, cut=False) + self["tau_bias"]
            if self["gate_depth_separable"]:
                g = self.separable(o, gate, depth, "cell/out_to_cell")
            else:
                g = self.dense(o, gate, depth, "cell/out_to_cell", bias=True, cut=False) + self["gate_bias"]
            t, g = self.modulators(t, g, x, r, depth, "cell", tau, gate)
        return FUNCTIONS[self["cell_activation"]](self.normed(self.gain("tau", t) * c + self.gain("gate", g) * drive, "cell"))

    def modulators(
        self, t: Array, g: Array, x: Array, r: Array | None, depth: int, half: str, tau: tuple[int, int], gate: tuple[int, int]
    ) -> tuple[Array, Array]:
        plain = {"bias": False, "cut": False}
        if self["input_to_tau"]:
            t = t + self.dense(x, tau, depth, f"{half}/input_to_{half}_tau", **plain)
        if r is not None and self[f"residual_to_{half}_tau"]:
            t = t + self.dense(r, tau, depth, f"{half}/residual_to_{half}_tau", **plain)
        if self["input_to_gate"]:
            g = g + self.dense(x, gate, depth, f"{half}/input_to_{half}_gate", **plain)
        if r is not None and half == "cell" and self["residual_to_cell_gate"]:
            g = g + self.dense(r, gate, depth, "cell/residual_to_cell_gate", **plain)
        return t, g

    def out(self, x: Array, c: Array | None, o: Array, r: Array | None, f: Array | None, depth: int) -> Array:
        tau, gate, in_out = (_pair(self[f"{name}_filter_size"]) for name in ("tau", "gate", "in_out"))
        drive = x
        if self["input_to_out"]:
            if self["in_out_depth_separable"]:
                drive = self.separable(x, in_out, depth, "out/input_to_out")
            else:  # (the shallow form makes a bias here and never adds it)
                drive = self.dense(x, in_out, depth, "out/input_to_out", bias=self.median, cut=False)
        from_cell: Array | None = None
        if c is not None:
            if not self.median:
                from_cell = self.shallow_conv(c, gate, depth, "out/gate", self["gate_depth_separable"])
            elif self["gate_depth_separable"]:
                from_cell = self.separable(c, gate, depth, "out/cell_to_out" if self["cell_to_out"] else "out/gate")
            else:
                from_cell = self.dense(c, gate, depth, "out/cell_to_out", bias=True, cut=False) + self["gate_bias"]
        g = np.zeros_like(o)
        if from_cell is not None and self["cell_to_out"]:
            drive = drive + from_cell
        elif from_cell is not None:
            g = from_cell
        if r is not None and self["out_residual"]:
            scope = "out" if self.median else "out/res_add"
            drive = drive + (r if r.shape[3] == depth else same(r, self.v.get(f"{scope}/residual_add_weights", (1, 1, r.shape[3], depth))))
        if f is not None and self["feedback_entry"] == "out":
            drive = drive + self.feedback(f, depth, "out")
        if not self.median:
            t = self.shallow_conv(o, tau, depth, "out/tau", self["tau_depth_separable"])
        elif self["tau_depth_separable"]:
            t = self.separable(o, tau, depth, "out/tau")
        else:
            t = self.dense(o, tau, depth, "out/out_to_out", bias=True, cut=False) + self["tau_bias"]
        if self.median:
            t, g = self.modulators(t, g, x, r, depth, "out", tau, gate)
        if r is not None and self["residual_to_out_gate"]:
            if not self.median:
                g = g + self.shallow_conv(r, gate, depth, "out/residual_to_out_gate", self["gate_depth_separable"])
            elif self["gate_depth_separable"]:
                g = g + self.separable(r, gate, depth, "out/residual_to_out_gate", bias=False)
            else:
                g = g + self.dense(r, gate, depth, "out/residual_to_out_gate", bias=False, cut=False)
        return FUNCTIONS[self["out_activation"]](self.normed(self.gain("tau", t) * o + self.gain("gate", g) * drive, "out"))
