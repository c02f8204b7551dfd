// The epilogue of convolutions: interaction with an area's other terms and moments for its LayerNorm, on a block of results that has just been
// written and so lies in L1. Included inside namespace rnndyn::<isa> after winograd_transform_kernel.h; parameters are documented in
// conv_epilogue.h.
//
// Maths: as area_step has it; z = (b + r) or (b + r) (1 + m) or b (1 + m + r), for the convolution's result r.
// Precision: the moments of a block are taken per vector lane about the lane's own mean and merged by Chan's parallel variance; the lanes of a
//   sample are summed in double about the sample's mean. Never E[z^2] - E[z]^2.
// Traffic: the other terms once, asked for one block ahead by winograd_conv; the value, from L1, twice; one cell (three vectors) per block; the
//   sum of the modulators past the caches, where registers are whole lines.
// Sync: such stores are put in order by each thread before the barrier that ends its blocks.
// Determinism: cells depend on the shape alone, and a sample's cells are summed in one order, so results do not depend on the number of threads.

// What only backward reads: whole lines go past the caches, which would read them first.
static inline void store_past_caches(float* p, vec v, int64_t count) {
#ifdef __AVX512F__
  if (count >= kVectorFloats && reinterpret_cast<uintptr_t>(p) % 64 == 0) return _mm512_stream_ps(p, __m512(v));
#endif
  store_part(p, v, count);
}

// For each thread, after its last block: such stores come before what follows.
static inline void epilogue_end() {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}

// Per lane: how many values, their mean, and the sum of squared deviations from it.
struct LaneMoments {
  vec count, mean, m2;

  void merge(vec other_count, vec other_mean, vec other_m2) {
    const vec total = count + other_count, share = total > 0.0f ? other_count / total : vec{};
    const vec delta = other_mean - mean;
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
};
constexpr int64_t kLaneMomentsFloats = sizeof(LaneMoments) / 4;

// `value` in the first `lanes` lanes, zero in the others.
static inline vec in_lanes(float value, int64_t lanes) {
  if (lanes >= kVectorFloats) return value + vec{};
  float each[kVectorFloats];
  for (int i = 0; i < kVectorFloats; ++i) each[i] = i < lanes ? value : 0.0f;
  return load(each);
}

// The other terms' lines of a pixel whose results will lie at y: blocks are small and far apart, so that the processor does not see what comes.
static inline void epilogue_ask(const ConvEpilogue& e, const float* y) {
  const int64_t offset = y - e.value;
  for (int k = 0; k < e.num_drive; ++k) __builtin_prefetch(e.drive[k] + offset, 0, 3);
  for (int k = 0; k < e.num_modulator; ++k) __builtin_prefetch(e.modulator[k] + offset, 0, 3);
}

// A vector of results, and the area's other terms there, as its value z, which takes their place. kFull: all lanes are channels.
template <bool kFull>
static inline vec epilogue_value(const ConvEpilogue& e, float* at, int64_t lanes, bool modulated, vec drive_bias,
                                 vec modulator_bias) {
  if constexpr (kFull) lanes = kVectorFloats;
  const int64_t offset = at - e.value;
  vec value = load_part(at, lanes), factor = 1.0f + modulator_bias;
  if (e.modulates) {
    factor += value;
    value = drive_bias;
  } else {
    value += drive_bias;
  }
  for (int k = 0; k < e.num_drive; ++k) value += load_part(e.drive[k] + offset, lanes);
  if (modulated) {
    for (int k = 0; k < e.num_modulator; ++k) factor += load_part(e.modulator[k] + offset, lanes);
    if (e.modulator_sum != nullptr) store_past_caches(e.modulator_sum + offset, factor, lanes);
    value *= factor;
  }
  store_part(at, value, lanes);
  return value;
}

// Sums over rows x cols pixels of function(pixel), in four sums, so that additions do not wait for each other.
template <class Function>
static inline vec sum_of_pixels(float* y, int64_t rows, int64_t row_stride, int64_t cols, int64_t col_stride,
                                Function function) {
  vec s0{}, s1{}, s2{}, s3{};
  for (int64_t r = 0; r < rows; ++r) {
    float* at = y + r * row_stride;
    int64_t j = 0;
    for (; j + 4 <= cols; j += 4, at += 4 * col_stride) {
      s0 += function(at);
      s1 += function(at + col_stride);
      s2 += function(at + 2 * col_stride);
      s3 += function(at + 3 * col_stride);
    }
    for (; j < cols; ++j, at += col_stride) s0 += function(at);
  }
  return (s0 + s1) + (s2 + s3);
}

// One vector of channels, from `channel` on, of the results at y.
template <bool kFull>
static inline void epilogue_channels(const ConvEpilogue& e, float* y, int64_t rows, int64_t row_stride, int64_t cols,
                                     int64_t col_stride, int64_t channel, int64_t lanes, LaneMoments* cell) {
  if constexpr (kFull) lanes = kVectorFloats;
  const bool modulated = e.modulates || e.num_modulator > 0;
  const bool alone = !modulated && e.num_drive == 0 && e.drive_bias == nullptr;
  const vec drive_bias = e.drive_bias != nullptr ? load_part(e.drive_bias + channel, lanes) : vec{};
  const vec modulator_bias = e.modulator_bias != nullptr ? load_part(e.modulator_bias + channel, lanes) : vec{};
  auto value = [&](float* at) {
    return alone ? load_part(at, lanes) : epilogue_value<kFull>(e, at, lanes, modulated, drive_bias, modulator_bias);
  };
  const vec sum = sum_of_pixels(y, rows, row_stride, cols, col_stride, value);
  if (cell == nullptr) return;
  const vec mean = sum * (1.0f / float(rows * cols));
  auto square = [&](const float* at) {
    const vec deviation = load_part(at, lanes) - mean;
    return deviation * deviation;
  };
  cell->merge(in_lanes(float(rows * cols), lanes), mean, sum_of_pixels(y, rows, row_stride, cols, col_stride, square));
}

// The results at y: rows x cols pixels, `channels` of them from first_channel on. Their moments are merged into the cell, if there is one.
static void epilogue_block(const ConvEpilogue& e, float* y, int64_t rows, int64_t row_stride, int64_t cols,
                           int64_t col_stride, int64_t first_channel, int64_t channels, LaneMoments* cell) {
  int64_t c = 0;
  for (; c + kVectorFloats <= channels; c += kVectorFloats)
    epilogue_channels<true>(e, y + c, rows, row_stride, cols, col_stride, first_channel + c, kVectorFloats, cell);
  if (c < channels)
    epilogue_channels<false>(e, y + c, rows, row_stride, cols, col_stride, first_channel + c, channels - c, cell);
}

// Statistics of one sample from its cells.
static void epilogue_statistics(const ConvEpilogue& e, int64_t sample, const LaneMoments* cells, int64_t num_cells) {
  double count = 0, sum = 0, m2 = 0;
  for (int64_t i = 0; i < num_cells; ++i) {
    const float* n = reinterpret_cast<const float*>(&cells[i].count);
    const float* mean = reinterpret_cast<const float*>(&cells[i].mean);
#pragma omp simd reduction(+ : count, sum)
    for (int lane = 0; lane < kVectorFloats; ++lane) {
      count += double(n[lane]);
      sum += double(n[lane]) * double(mean[lane]);
    }
  }
  const double mean_of_all = sum / count;
  for (int64_t i = 0; i < num_cells; ++i) {
    const float* n = reinterpret_cast<const float*>(&cells[i].count);
    const float* mean = reinterpret_cast<const float*>(&cells[i].mean);
    const float* squares = reinterpret_cast<const float*>(&cells[i].m2);
#pragma omp simd reduction(+ : m2)
    for (int lane = 0; lane < kVectorFloats; ++lane) {
      const double delta = double(mean[lane]) - mean_of_all;
      m2 += double(squares[lane]) + double(n[lane]) * delta * delta;
    }
  }
  e.mean[sample] = float(mean_of_all);
  e.rstd[sample] = float(1.0 / __builtin_sqrt(m2 / count + e.eps));
}
