"""Words for connections: which term of which area is computed from what, and how."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from rnndyn_fast.ops.engines import Geometry, Operator, output_length

Shape = tuple[int, int, int]  # channels, height, width
SAME: Literal["same"] = "same"
FIT: Literal["fit"] = "fit"


class Role(enum.Enum):
    """Where a connection comes from, seen from its target; it decides the term it makes (:attr:`Connection.port`) and its delay."""

    BOTTOM_UP = "bottom_up"
    LATERAL = "lateral"
    TOP_DOWN = "top_down"


class Pool(enum.Enum):
    """What a connection does to the map of its source first.

    NONE: nothing; MAX: 2 x 2 maximum, stride 2 (an odd row or column at the end is left out); MAX_SAME: the same, an odd row or column
    is pooled alone; MEAN: the mean over the map.
    """

    NONE = "none"
    MAX = "max"
    MEAN = "mean"
    MAX_SAME = "max_same"

    __hash__ = object.__hash__  # (members are looked up at every time step; Enum's is Python)


@dataclass(frozen=True)
class Window:
    """How a connection's kernel lies on the map it reads, by axis (height, width)."""

    kernel: tuple[int, int]
    before: tuple[int, int]  # padding
    after: tuple[int, int]
    output_padding: tuple[int, int] = (0, 0)

    @property
    def symmetric(self) -> bool:
        """Whether one number says the kernel, and one the padding."""
        return len(set(self.kernel)) == 1 and len({*self.before, *self.after}) == 1 and len(set(self.output_padding)) == 1


@dataclass(frozen=True)
class Connection:
    """A term of ``target`` computed from ``source``.

    The map of the source is pooled, resized, and goes through the linear map. Fields:

    ``kernel_size``: a number, or (height, width). ``padding``: one number for all sides; None keeps the size ((K-1)/2; of a kernel that is
    not square: "same"); "same" is that of TensorFlow (out = ceil(in / stride), an odd
    total puts the larger half after the map). ``output_padding`` (transposed): a number; None is stride - 1; "fit" is what makes the
    target's map. ``delay`` in time steps: 0 (the source's map of the same step), 1, or None: what the network's ``unroll`` says.
    ``parameter`` is the prefix of ``<prefix>.weight`` and ``<prefix>.bias``; connections of one source with one prefix share the term.

    ``groups``: the convolution connects channels within groups. ``middle_channels``: the convolution makes that many channels and a
    1 x 1 convolution follows (depthwise separable where groups and middle channels are those of the source); the two are
    ``<prefix>_depthwise`` (with a bias if ``middle_bias``) and ``<prefix>_pointwise``. ``cut_kernel``: a kernel larger than the map
    is cut to it. ``resize``: the map is first resized to that of the target (bilinear, corners aligned). ``concat=(first, total)``: the
    connection uses input channels ``first ..`` of a weight of ``total`` (its source is one of several that are concatenated).

    ``steps``: the time steps at which the connection is there; None: all.

    ``state``: which map of a source with several it reads (None: its output). ``port``: the term of the target it enters: "drive" or
    "modulator", or a port of the target's cell; None: by role (see :class:`~rnndyn_fast.graph.spec.areas.Interaction`), or the first port.
    """

    source: str
    target: str
    role: Role
    operator: Operator = Operator.CONV
    kernel_size: int | tuple[int, int] = 1
    stride: int = 1
    padding: int | Literal["same"] | None = None
    output_padding: int | Literal["fit"] | None = None
    pool: Pool = Pool.NONE
    bias: bool = False
    parameter: str | None = None
    delay: int | None = None
    groups: int = 1
    middle_channels: int | None = None
    middle_bias: bool = False
    cut_kernel: bool = False
    resize: bool = False
    concat: tuple[int, int] | None = None
    state: str | None = None
    port: str | None = None
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.kernel_size, list | tuple):  # a square one is one number
            height, width = self.kernel_size
            object.__setattr__(self, "kernel_size", height if height == width else (height, width))
        if self.operator is not Operator.IDENTITY and self.parameter is None:
            object.__setattr__(self, "parameter", f"{self.target}.{self.role.value}")
        if self.padding is None:
            size = self.kernel_size
            object.__setattr__(self, "padding", (size - 1) // 2 if isinstance(size, int) else SAME)
        if self.output_padding is None:
            object.__setattr__(self, "output_padding", self.stride - 1 if self.operator is Operator.CONV_TRANSPOSE else 0)
        if self.concat is not None:
            object.__setattr__(self, "concat", tuple(self.concat))
        if self.steps is not None:
            object.__setattr__(self, "steps", tuple(self.steps))

    def is_there(self, t: int) -> bool:
        """Whether the connection is there at a time step."""
        return self.steps is None or t in self.steps

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel, before it is cut."""
        return (self.kernel_size, self.kernel_size) if isinstance(self.kernel_size, int) else self.kernel_size

    @property
    def geometry(self) -> Geometry:
        """The linear map as the convolution op takes it, where paddings are numbers."""
        assert isinstance(self.padding, int)
        assert isinstance(self.output_padding, int)
        return Geometry(self.operator, self.stride, self.padding, self.output_padding)

    @property
    def label(self) -> str:
        """A short name for plans and messages."""
        source = self.source if self.state is None else f"{self.source}:{self.state}"
        return f"{source} -> {self.target} ({self.role.value})"

    @property
    def sizes_target(self) -> bool:
        """Whether the size of the target follows from that of the source."""
        return not self.resize and self.output_padding != FIT

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of its weights: none, one, or two."""
        if self.operator is Operator.IDENTITY:
            return ()
        if self.middle_channels is not None:
            return f"{self.parameter}_depthwise.weight", f"{self.parameter}_pointwise.weight"
        return (f"{self.parameter}.weight",)

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of its biases."""
        if self.middle_channels is None:
            return (f"{self.parameter}.bias",) if self.bias else ()
        names = (f"{self.parameter}_depthwise.bias", self.middle_bias), (f"{self.parameter}_pointwise.bias", self.bias)
        return tuple(name for name, there in names if there)

    @property
    def output_bias(self) -> str | None:
        """Name of the bias that is added to the result."""
        if not self.bias:
            return None
        return f"{self.parameter}.bias" if self.middle_channels is None else f"{self.parameter}_pointwise.bias"

    def window(self, size: tuple[int, int], target: tuple[int, int] | None = None) -> Window:
        """The kernel on a map of this size (after pooling and resizing); ``target``: the map to make, where "fit" asks for it."""
        kernel = [min(k, n) if self.cut_kernel else k for k, n in zip(self.kernel, size, strict=True)]
        if self.padding == SAME:
            total = [max((-(-n // self.stride) - 1) * self.stride + k - n, 0) for n, k in zip(size, kernel, strict=True)]
            before, after = [n // 2 for n in total], [n - n // 2 for n in total]
        else:
            assert isinstance(self.padding, int)
            before = after = [self.padding] * 2
        if self.output_padding == FIT:
            assert target is not None
            extra = [
                t - output_length(self.operator, n, k, self.stride, 2 * b) for t, n, b, k in zip(target, size, before, kernel, strict=True)
            ]
            if not all(0 <= n < max(self.stride, 2) for n in extra):
                raise ValueError(
                    f"connection {self.label}: no output padding makes a map of {target} from one of {size} "
                    f"(kernel {kernel[0]} x {kernel[1]}, stride {self.stride}, padding {before[0]})"
                )
        else:
            assert isinstance(self.output_padding, int)
            extra = [self.output_padding] * 2
        pairs = ((v[0], v[1]) for v in (kernel, before, after, extra))
        return Window(*pairs)

    def output_size(self, source: Shape) -> tuple[int, int]:
        """Height and width that it makes from a source's shape [C, H, W]; not for those of which ``sizes_target`` is False."""
        _, height, width = pooled_shape(source, self.pool)
        size = (height, width)
        if self.operator is Operator.LINEAR and size != (1, 1):
            raise ValueError(f"connection {self.label}: a linear map needs a 1 x 1 map (pool=Pool.MEAN?), got {height} x {width}")
        if self.operator in (Operator.CONV, Operator.CONV_TRANSPOSE):
            w = self.window(size)
            padding = [b + a - e for b, a, e in zip(w.before, w.after, w.output_padding, strict=True)]
            height, width = (output_length(self.operator, n, k, self.stride, p) for n, k, p in zip(size, w.kernel, padding, strict=True))
        if min(height, width) < 1:
            raise ValueError(
                f"connection {self.label}: the source map {source} is too small, the result would be {height} x {width}; "
                "larger images have larger maps"
            )
        return height, width

    def check(self) -> None:
        """Raise ``ValueError`` naming the field that makes no sense, whatever the maps are."""
        if min(self.kernel) < 1 or self.stride < 1:
            raise ValueError(f"connection {self.label}: expected kernel_size and stride >= 1, got {self.kernel_size} and {self.stride}")
        if self.operator is Operator.IDENTITY and (self.bias or self.middle_channels or self.concat):
            named = "bias=False" if self.bias else "no middle_channels, no concat"
            raise ValueError(f"connection {self.label}: the identity has no parameters, so expected {named}")
        if self.delay not in (None, 0, 1):
            raise ValueError(f"connection {self.label}: expected delay 0, 1 or None, got {self.delay}")
        if isinstance(self.padding, str) and (self.padding != SAME or self.operator is not Operator.CONV):
            raise ValueError(f'connection {self.label}: expected padding as a number, or "same" for a convolution, got {self.padding!r}')
        if isinstance(self.output_padding, str) and (self.output_padding != FIT or self.operator is not Operator.CONV_TRANSPOSE):
            raise ValueError(
                f'connection {self.label}: expected output_padding as a number, or "fit" for a transposed convolution, '
                f"got {self.output_padding!r}"
            )
        conv = self.operator is Operator.CONV
        if not conv and (self.groups != 1 or self.middle_channels is not None or self.cut_kernel):
            raise ValueError(
                f"connection {self.label}: groups, middle_channels and cut_kernel are of convolutions, not {self.operator.value}"
            )
        if self.operator is not Operator.CONV_TRANSPOSE and self.output_padding != 0:
            raise ValueError(f"connection {self.label}: output_padding is of transposed convolutions, not {self.operator.value}")
        if self.groups < 1 or (self.middle_channels is not None and self.middle_channels < 1):
            raise ValueError(
                f"connection {self.label}: expected groups and middle_channels >= 1, got {self.groups} and {self.middle_channels}"
            )
        if self.middle_bias and self.middle_channels is None:
            raise ValueError(f"connection {self.label}: middle_bias needs middle_channels")
        if self.concat is not None and (not conv or self.groups != 1):
            raise ValueError(f"connection {self.label}: concat is of convolutions with groups=1")


def pooled_shape(shape: Shape, pool: Pool) -> Shape:
    """The shape of a map after pooling."""
    channels, height, width = shape
    if pool is Pool.MAX:
        return channels, height // 2, width // 2
    if pool is Pool.MAX_SAME:
        return channels, -(-height // 2), -(-width // 2)
    if pool is Pool.MEAN:
        return channels, 1, 1
    return shape
