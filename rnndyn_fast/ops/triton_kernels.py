"""The fused recurrent convolution and its weight gradient as Triton kernels, for :mod:`rnndyn_fast.ops.triton_conv`, which alone imports
this module (and Triton with it).

Maths: s = sum_k conv_k(x_k) + bias + sum added;  value = s, or drive * (1 + s);  moments of value per pixel and column tile.
  An implicit matrix product: its rows are output pixels, its columns output channels, and its depth runs over terms, taps and slabs of
  input channels. With output row h and tap i = first + step * t, a term reads the row (w and columns likewise)
    convolution: h * stride - pad + t, first = 0, step = 1
    transposed:  (h + pad - first) / stride - t, first = (h + pad) mod stride, step = stride
  so that a transposed term walks only taps that reach the pixel. A tile's pixels are of one phase (h and w modulo PHASES, a multiple of
  every transposed stride), which makes `first` one number for all of them: no product with a zero that upsampling would insert. The
  gradient of the data is the same kernel on transposed terms, and the other way round.
Precision: products of the maps' dtype (float32: PRECISION, "tf32" or "ieee"), float32 sums in the order of the depth; the modulator is
  rounded to the maps' dtype before it multiplies, and moments are those of what is stored.
Addresses: pixels are counted in int32 (launches check that they can be), elements in int64 where WIDE. Channels are passed as units of
  VECTOR elements, a power of two that divides them: so the compiler knows how far loads can be widened, and no further.
Determinism: yes; no atomics. Splits of a weight gradient's depth are summed in order by the launch.
"""
# mypy: disable-error-code="no-untyped-def"

from importlib.util import find_spec

from rnndyn_fast.optional import require

if find_spec("triton"):  # (every module of the package can be imported without its optional packages)
    require("triton")
    import triton
    import triton.language as tl

    @triton.jit
    def _size(coded):
        # Of numbers in tuples, 1 and multiples of 16 would each be compiled for, which none of 2 n + 3 is.
        return (coded >> 1) - 1

    @triton.jit
    def _add_term(
        sums,  # [ROWS, COLUMNS] float32
        x,  # [N, x_height, x_width, C']
        weight,  # [C, kernel, kernel, C']
        x_height,
        x_width,
        units,
        kernel,
        stride,
        pad,
        sample,  # [ROWS] int32: the output pixels, and which of them there are
        row,
        column,
        inside,
        phase_row,
        phase_column,
        output,  # [COLUMNS] int32: the output channels, and which of them there are
        output_inside,
        TRANSPOSED: tl.constexpr,
        VECTOR: tl.constexpr,
        INDEX: tl.constexpr,
        DEPTH: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        channels = units * VECTOR
        if TRANSPOSED:
            step = stride
            first_row = (phase_row + pad) % stride
            first_column = (phase_column + pad) % stride
            y0 = (row + pad - first_row) // stride  # (never negative: the phase is the pixel's, modulo the stride)
            x0 = (column + pad - first_column) // stride
        else:
            step = 1
            first_row = 0
            first_column = 0
            y0 = row * stride - pad
            x0 = column * stride - pad
        # 0 where the kernel is smaller than the stride and no tap reaches this phase.
        tap_rows = (kernel - first_row + step - 1) // step
        tap_columns = (kernel - first_column + step - 1) // step
        # May lie before the map, where nothing is read.
        pixels = x + ((sample.to(INDEX) * x_height + y0) * x_width + x0) * channels
        kernels = weight + output.to(INDEX) * (kernel * kernel * channels)
        channel = 0
        i = 0
        j = 0
        for _ in range(tap_rows * tap_columns * tl.cdiv(channels, DEPTH)):
            if TRANSPOSED:
                at_y = y0 - i
                at_x = x0 - j
                shift = -(i * x_width + j) * channels
            else:
                at_y = y0 + i
                at_x = x0 + j
                shift = (i * x_width + j) * channels
            tap = (first_row + i * step) * kernel + first_column + j * step
            depth = channel + tl.arange(0, DEPTH)
            depth_inside = depth < channels
            reached = inside & (at_y >= 0) & (at_y < x_height) & (at_x >= 0) & (at_x < x_width)
            a = tl.load(pixels[:, None] + (shift + depth)[None, :], mask=reached[:, None] & depth_inside[None, :], other=0.0)
            b = tl.load(
                kernels[None, :] + (tap * channels + depth)[:, None], mask=depth_inside[:, None] & output_inside[None, :], other=0.0
            )
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
            # The next slab, of the next tap where the channels are done.
            channel += DEPTH
            next_tap = channel >= channels
            channel = tl.where(next_tap, 0, channel)
            j += tl.where(next_tap, 1, 0)
            next_row = j >= tap_columns
            j = tl.where(next_row, 0, j)
            i += tl.where(next_row, 1, 0)
        return sums

    # (No size is compiled in: one kernel serves all maps, kernels and strides of a network.)
    @triton.jit(do_not_specialize=("samples", "height", "width", "units"))
    def recurrent_conv_kernel(
        xs,  # of each term: [N, H', W', C']
        weights,  # of each term: [C, K, K, C']
        geometry,  # of each term: H', W', C' in units of its vector, K, stride, padding; each number n as 2 n + 3, see _size
        bias,  # [C] float32, or None
        added,  # each [N, H, W, C]
        drive,  # [N, H, W, C], or None
        value,  # [N, H, W, C], written
        modulator_sum,  # [N, H, W, C], written: 1 + s; or None
        moments,  # [N, H, W, column tiles, 2] float32, written: mean, and sum of squared deviations from it; or None
        samples,
        height,
        width,
        units,
        TRANSPOSED: tl.constexpr,  # of each term
        VECTORS: tl.constexpr,  # of each term
        VECTOR: tl.constexpr,
        PHASES: tl.constexpr,
        WIDE: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
        channels = units * VECTOR
        column_tiles = tl.cdiv(channels, COLUMNS)
        column_tile = tl.program_id(0) % column_tiles  # (adjacent programs share their pixels)
        phase_row = tl.program_id(1) // PHASES
        phase_column = tl.program_id(1) % PHASES
        grid_height = (height - phase_row + PHASES - 1) // PHASES
        grid_width = (width - phase_column + PHASES - 1) // PHASES
        first = tl.program_id(0) // column_tiles * ROWS
        if first >= samples * grid_height * grid_width:
            return  # (there are as many programs for each phase as the largest needs)
        index = first + tl.arange(0, ROWS)
        inside = index < samples * grid_height * grid_width
        sample = index // (grid_height * grid_width)
        row = index // grid_width % grid_height * PHASES + phase_row
        column = index % grid_width * PHASES + phase_column
        output = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        output_inside = output < channels

        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.static_range(len(xs)):
            sums = _add_term(
                sums, xs[k], weights[k], _size(geometry[k][0]), _size(geometry[k][1]), _size(geometry[k][2]), _size(geometry[k][3]),
                _size(geometry[k][4]), _size(geometry[k][5]), sample, row, column, inside, phase_row, phase_column, output, output_inside,
                TRANSPOSED[k], VECTORS[k], INDEX, DEPTH, PRECISION,
            )  # fmt: skip

        storage: tl.constexpr = value.dtype.element_ty
        pixel = (sample * height + row) * width + column
        offsets = pixel.to(INDEX)[:, None] * channels + output[None, :]
        mask = inside[:, None] & output_inside[None, :]
        if bias is not None:
            sums += tl.load(bias + output, mask=output_inside, other=0.0)[None, :]
        for k in tl.static_range(len(added)):
            sums += tl.load(added[k] + offsets, mask=mask, other=0.0).to(tl.float32)
        if drive is not None:
            factor = (1 + sums).to(storage)
            sums = factor.to(tl.float32) * tl.load(drive + offsets, mask=mask, other=0.0).to(tl.float32)
        if drive is not None or len(added) > 0:
            tl.debug_barrier()  # `value` may be one of these maps: all threads have read what any of them writes over
        if modulator_sum is not None:
            tl.store(modulator_sum + offsets, factor, mask=mask)
        stored = sums.to(storage)
        tl.store(value + offsets, stored, mask=mask)
        if moments is not None:
            kept = tl.where(output_inside[None, :], stored.to(tl.float32), 0.0)
            mean = tl.sum(kept, axis=1) / tl.minimum(channels - column_tile * COLUMNS, COLUMNS).to(tl.float32)
            deviation = tl.where(output_inside[None, :], kept - mean[:, None], 0.0)
            place = moments + (pixel.to(INDEX) * column_tiles + column_tile) * 2
            tl.store(place, mean, mask=inside)
            tl.store(place + 1, tl.sum(deviation * deviation, axis=1), mask=inside)

    _WEIGHT_GRAD_SIZES = (
        "pixels", "height", "width", "row_units", "gathered_height", "gathered_width", "gathered_units", "kernel", "stride", "pad",
        "slabs_per_split", "map_factor", "map_shift", "width_factor", "width_shift",
    )  # fmt: skip

    @triton.jit(do_not_specialize=_WEIGHT_GRAD_SIZES)
    def recurrent_conv_weight_grad_kernel(
        rows,  # [N, H, W, A]
        gathered,  # [N, H', W', B]
        out,  # [splits, A, K, K, B] float32, written
        pixels,  # N H W
        height,
        width,
        row_units,  # A, B in units of their vectors
        gathered_height,
        gathered_width,
        gathered_units,
        kernel,
        stride,
        pad,
        slabs_per_split,
        map_factor,  # n // (H W) = n * map_factor >> map_shift, and likewise n // W
        map_shift,
        width_factor,
        width_shift,
        ROW_VECTOR: tl.constexpr,
        GATHERED_VECTOR: tl.constexpr,
        WIDE: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """grad[a, i, j, b] = sum over pixels (n, h, w) of rows[n, h, w, a] * gathered[n, h * stride + i - pad, w * stride + j - pad, b]: a
        product whose rows are the channels a, whose columns the channels b of one tap, and whose depth the pixels of one split."""
        INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
        row_channels = row_units * ROW_VECTOR
        gathered_channels = gathered_units * GATHERED_VECTOR
        row_tiles = tl.cdiv(row_channels, ROWS)
        row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(0) // row_tiles * COLUMNS + tl.arange(0, COLUMNS)
        tap = tl.program_id(1)
        tap_row = tap // kernel - pad
        tap_column = tap % kernel - pad
        row_inside = row < row_channels
        column_inside = column < gathered_channels
        split = tl.program_id(2)
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for slab in range(split * slabs_per_split, tl.minimum((split + 1) * slabs_per_split, tl.cdiv(pixels, DEPTH))):
            pixel = slab * DEPTH + tl.arange(0, DEPTH)
            inside = pixel < pixels
            sample = (pixel * map_factor >> map_shift).to(tl.int32)
            place = pixel - sample * (height * width)
            h = (place * width_factor >> width_shift).to(tl.int32)
            y = h * stride + tap_row
            x = (place - h * width) * stride + tap_column
            reached = inside & (y >= 0) & (y < gathered_height) & (x >= 0) & (x < gathered_width)
            place_a = rows + (pixel.to(INDEX) * row_channels)[None, :] + row[:, None]
            a = tl.load(place_a, mask=row_inside[:, None] & inside[None, :], other=0.0)
            source = (sample.to(INDEX) * gathered_height + y) * gathered_width + x
            place_b = gathered + (source * gathered_channels)[:, None] + column[None, :]
            b = tl.load(place_b, mask=reached[:, None] & column_inside[None, :], other=0.0)
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
        offsets = ((split.to(INDEX) * row_channels + row)[:, None] * (kernel * kernel) + tap) * gathered_channels + column[None, :]
        tl.store(out + offsets, sums, mask=row_inside[:, None] & column_inside[None, :])
