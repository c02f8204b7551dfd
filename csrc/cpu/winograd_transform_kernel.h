// One-dimensional Winograd transforms on vectors of channels, and their two-dimensional compositions over a tile.
// Included inside namespace rnndyn::<isa>.
//
// With points p (patches of 5: 0, 1, -1, 2; of 6: 0, +-1, +-2; of 8: those and +-1/2) and infinity:
//   input    B^T: row p holds the coefficients of prod_{q != p} (x - q), scaled; rows +p and -p share even and odd halves
//   output   A^T: row i holds p^i; infinity enters the last row
//   kernel   G:   row p holds s_p p^k, s_p = 1 / prod_{q != p} (p - q) up to the scale of B^T; the last row is (0, ..., 0, 1)
// y = A^T [(G g G^T) . (B^T d B)] A. The gradient of the weight is G^T [sum over tiles (B^T d B) . (A dy A^T)] G.

constexpr int kVectorFloats = RNNDYN_VECTOR_BYTES / 4;
typedef float vec __attribute__((vector_size(RNNDYN_VECTOR_BYTES)));
typedef float vec_unaligned __attribute__((vector_size(RNNDYN_VECTOR_BYTES), aligned(4)));

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static inline vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<vec_unaligned*>(p) = v; }

// The first `count` lanes; the others are zero, and memory past them is not touched.
static inline vec load_part(const float* p, int64_t count) {
  if (count >= kVectorFloats) return load(p);
  float lanes[kVectorFloats] = {0};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
static inline void store_part(float* p, vec v, int64_t count) {
  if (count >= kVectorFloats) {
    store(p, v);
    return;
  }
  float lanes[kVectorFloats];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// B^T d. d and out may not overlap; strides count vectors.
template <int Patch>
static inline void input_1d(const vec* d, int ds, vec* out, int os) {
  if constexpr (Patch == 5) {
    const vec d0 = d[0], d1 = d[ds], d2 = d[2 * ds], d3 = d[3 * ds], d4 = d[4 * ds];
    const vec a = d3 - d1;
    out[0] = a + 2.0f * (d0 - d2);
    out[os] = a - d1 - d2;
    out[2 * os] = d3 + 2.0f * d1 - 3.0f * d2;
    out[3 * os] = a;
    out[4 * os] = (d4 - d2) - 2.0f * a;
  } else if constexpr (Patch == 6) {
    const vec d0 = d[0], d1 = d[ds], d2 = d[2 * ds], d3 = d[3 * ds], d4 = d[4 * ds], d5 = d[5 * ds];
    out[0] = 4.0f * d0 - 5.0f * d2 + d4;
    const vec even1 = d4 - 4.0f * d2, odd1 = d3 - 4.0f * d1;
    out[os] = even1 + odd1;
    out[2 * os] = even1 - odd1;
    const vec even2 = d4 - d2, odd2 = 2.0f * (d3 - d1);
    out[3 * os] = even2 + odd2;
    out[4 * os] = even2 - odd2;
    out[5 * os] = 4.0f * d1 - 5.0f * d3 + d5;
  } else {
    const vec d0 = d[0], d1 = d[ds], d2 = d[2 * ds], d3 = d[3 * ds];
    const vec d4 = d[4 * ds], d5 = d[5 * ds], d6 = d[6 * ds], d7 = d[7 * ds];
    out[0] = (d0 - d6) + 5.25f * (d4 - d2);
    const vec even1 = d2 + d6 - 4.25f * d4, odd1 = d1 + d5 - 4.25f * d3;
    out[os] = even1 + odd1;
    out[2 * os] = even1 - odd1;
    const vec even2 = 0.25f * d2 - 1.25f * d4 + d6, odd2 = 0.5f * d1 - 2.5f * d3 + 2.0f * d5;
    out[3 * os] = even2 + odd2;
    out[4 * os] = even2 - odd2;
    const vec even3 = 4.0f * d2 - 5.0f * d4 + d6, odd3 = 2.0f * d1 - 2.5f * d3 + 0.5f * d5;
    out[5 * os] = even3 + odd3;
    out[6 * os] = even3 - odd3;
    out[7 * os] = (d7 - d1) + 5.25f * (d3 - d5);
  }
}

// A^T m: Outputs rows.
template <int Patch, int Outputs>
static inline void output_1d(const vec* m, int ms, vec* out, int os) {
  const vec s1 = m[ms] + m[2 * ms], t1 = m[ms] - m[2 * ms], last = m[(Patch - 1) * ms];
  // The points 2 and, where there is one, -2: sums enter even rows, differences odd ones.
  const vec s2 = Patch == 5 ? m[3 * ms] : m[3 * ms] + m[4 * ms], t2 = Patch == 5 ? m[3 * ms] : m[3 * ms] - m[4 * ms];
  vec s3{}, t3{};
  if constexpr (Patch == 8) s3 = m[5 * ms] + m[6 * ms], t3 = m[5 * ms] - m[6 * ms];
  float power2 = 1.0f, power_half = 1.0f;
#pragma GCC unroll 6
  for (int i = 0; i < Outputs; ++i) {
    vec y = i % 2 == 0 ? s1 + power2 * s2 : t1 + power2 * t2;
    if constexpr (Patch == 8) y += power_half * (i % 2 == 0 ? s3 : t3);
    if (i == 0) y += m[0];
    if (i == Outputs - 1) y += last;
    out[i * os] = y;
    power2 *= 2.0f;
    power_half *= 0.5f;
  }
}

// A g: from Outputs gradients to Patch values.
template <int Patch, int Outputs>
static inline void gradient_1d(const vec* g, int gs, vec* out, int os) {
  const float points[3] = {1.0f, 2.0f, 0.5f};
  out[0] = g[0];
#pragma GCC unroll 3
  for (int pair = 0; pair < (Patch - 1) / 2; ++pair) {
    const float p = points[pair];
    vec even = g[0], odd{};
    float power = 1.0f;
#pragma GCC unroll 6
    for (int i = 1; i < Outputs; ++i) {
      power *= p;
      if (i % 2 == 0) {
        even += power * g[i * gs];
      } else {
        odd += power * g[i * gs];
      }
    }
    out[(2 * pair + 1) * os] = even + odd;
    if (2 * pair + 2 < Patch - 1) out[(2 * pair + 2) * os] = even - odd;
  }
  out[(Patch - 1) * os] = g[(Outputs - 1) * gs];
}

// s_p p^k: row j of G for j < Patch - 1.
template <int Patch>
static constexpr float kernel_coefficient(int j, int k) {
  const float points[7] = {0.0f, 1.0f, -1.0f, 2.0f, -2.0f, 0.5f, -0.5f};
  const float scales5[7] = {1.0f / 2, -1.0f / 2, -1.0f / 6, 1.0f / 6, 0.0f, 0.0f, 0.0f};
  const float scales6[7] = {1.0f / 4, -1.0f / 6, -1.0f / 6, 1.0f / 24, 1.0f / 24, 0.0f, 0.0f};
  const float scales8[7] = {1.0f, -2.0f / 9, -2.0f / 9, 1.0f / 90, 1.0f / 90, 32.0f / 45, 32.0f / 45};
  float value = Patch == 5 ? scales5[j] : Patch == 6 ? scales6[j] : scales8[j];
  for (int i = 0; i < k; ++i) value *= points[j];
  return value;
}

// G g: from Kernel weights to Patch values.
template <int Patch, int Kernel>
static inline void kernel_1d(const vec* g, int gs, vec* out, int os) {
#pragma GCC unroll 8
  for (int j = 0; j < Patch - 1; ++j) {
    vec sum = kernel_coefficient<Patch>(j, 0) * g[0];
#pragma GCC unroll 5
    for (int k = 1; k < Kernel; ++k)
      if (j > 0) sum += kernel_coefficient<Patch>(j, k) * g[k * gs];
    out[j * os] = sum;
  }
  out[(Patch - 1) * os] = g[(Kernel - 1) * gs];
}

// G^T m: from Patch sums to the Kernel gradients of the weights.
template <int Patch, int Kernel>
static inline void kernel_transposed_1d(const vec* m, int ms, vec* out, int os) {
#pragma GCC unroll 5
  for (int k = 0; k < Kernel; ++k) {
    vec sum = k == 0 ? kernel_coefficient<Patch>(0, 0) * m[0] : vec{};
#pragma GCC unroll 8
    for (int j = 1; j < Patch - 1; ++j) sum += kernel_coefficient<Patch>(j, k) * m[j * ms];
    if (k == Kernel - 1) sum += m[(Patch - 1) * ms];
    out[k * os] = sum;
  }
}
