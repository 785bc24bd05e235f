// Batch norm of training on a CPU, with or without a ReLU behind it.
//
//   forward:   y = relu?((x - mean) * scale + bias), scale = weight / sqrt(variance + eps)
//   backward: dx = scale * (g - sum(g) / rows - (x - mean) * sum(g * (x - mean)) / (variance + eps) / rows)
//              g = dy where y is not clamped, else 0
//
// Here the mean is that of floats, and what it lacks is a part of the summand (`shift`, `level`): where it is huge beside
// the variance, x - mean is exact, and x * scale - mean * scale would not be.
//
// An image laid out (batch, height, width, channels) is a matrix of rows (one pixel) and channels. Both directions are
// a pass that sums over rows and one that computes the result. What they wait for is memory; so a thread works on the
// same rows in both, in the second from the last to the first, which are still in its cache.
//
// The matrix is cut into chunks of rows. Sums of a chunk are in float, around the chunk's own first values, so that
// nothing cancels; chunks are put together in double. Neither depends on the number of threads, nor does any bit of the
// result. Where channels do not fill vectors well, several rows are taken as one long one (`fold`), and what does not
// fill the last vector is computed twice. Vectors are GCC's and Clang's own, as long as the machine's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, WIDE = 4;  // WIDE: blocks whose sums are kept in registers
#elif defined(__AVX__)
constexpr int BYTES = 32, WIDE = 2;
#else
constexpr int BYTES = 16, WIDE = 2;
#endif
constexpr int LANES = BYTES / sizeof(float);
constexpr int BLOCK = 2 * LANES;              // columns that are loaded and stored together
constexpr int64_t CHUNK = 1 << 14;            // numbers of a chunk, roughly
constexpr int64_t LEAST_ROWS = 64;            // of a chunk: its sums should be much less than itself
constexpr int64_t SHARED = 1 << 15;           // numbers from which on a second thread pays
constexpr int64_t GROUP = 16;                 // floats of one cache line

typedef uint16_t Brain;  // bfloat16, as bits
typedef float Number __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
constexpr uint32_t HIGH = 0xffff0000u;

struct Pair {
    Number a, b;  // of a block of bfloat16 the even and the odd columns, of floats the first and the second half
};

template <typename T> constexpr bool interleaved = sizeof(T) == 2;

inline Pair load(const Brain* from) {
    Bits both;
    std::memcpy(&both, from, BYTES);
    return {(Number)(both << 16), (Number)(both & HIGH)};
}

inline Pair load(const float* from) {
    Pair pair;  // copied as a whole it would pass through memory
    std::memcpy(&pair.a, from, BYTES);
    std::memcpy(&pair.b, from + LANES, BYTES);
    return pair;
}

// To the nearest, to even in the middle. What is no number stays none: the lower half of its bits is 0, as it comes
// from a bfloat16, from arithmetic or from `clean`, so that nothing is carried over.
inline Bits rounded(Number value) {
    const Bits bits = (Bits)value;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(Brain* to, Pair pair) {
    const Bits both = (rounded(pair.a) >> 16) | (rounded(pair.b) & HIGH);
    std::memcpy(to, &both, BYTES);
}

inline void store(float* to, Pair pair) {
    std::memcpy(to, &pair.a, BYTES);
    std::memcpy(to + LANES, &pair.b, BYTES);
}

inline float as_float(float value) { return value; }
inline float as_float(Brain value) {
    const uint32_t bits = (uint32_t)value << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void set(float& to, float value) { to = value; }
inline void set(Brain& to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to = (Brain)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float clean(double value) {
    return std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : (float)value;
}

// NaN stays
inline Number clamped(Number value) {
#if defined(__AVX512F__)
    return _mm512_max_ps(_mm512_setzero_ps(), value);
#elif defined(__AVX__)
    return _mm256_max_ps(_mm256_setzero_ps(), value);
#else
    return value < 0 ? Number{} : value;
#endif
}

inline Number where_open(Number y, Number g) {
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NLE_UQ), g);
#elif defined(__AVX__)
    return _mm256_and_ps(_mm256_cmp_ps(y, _mm256_setzero_ps(), _CMP_NLE_UQ), g);
#else
    return y <= 0 ? Number{} : g;
#endif
}

struct Matrix {
    int64_t channels, fold, width, blocks, rows, chunk, chunks, rest, stride;

    // rows of all channels, taken `fold` at a time as rows of `width`; of the `rest` there are less than `fold`
    Matrix(int64_t all_rows, int64_t channels) : channels(channels) {
        for (fold = 1; fold * channels < 2 * BLOCK || padded() > 1.1 * fold * channels;) ++fold;
        width = fold * channels;
        blocks = padded() / BLOCK;
        rows = all_rows / fold;
        rest = all_rows % fold;
        chunk = std::max(CHUNK / width, LEAST_ROWS);
        chunks = (rows + chunk - 1) / chunk;
        stride = (width + GROUP - 1) / GROUP * GROUP;
    }

    int64_t padded() const { return (fold * channels + BLOCK - 1) / BLOCK * BLOCK; }
    int64_t start(int64_t block) const { return std::min(block * BLOCK, width - BLOCK); }
    int64_t count(int64_t index) const { return std::min(chunk, rows - index * chunk); }
    int64_t all_rows() const { return rows * fold + rest; }
};

// Numbers of channels as vectors for every block.
template <typename T, typename Source>
void spread(const Matrix& m, Source source, float* to) {
    for (int64_t block = 0; block < m.blocks; ++block, to += BLOCK)
        for (int64_t i = 0, c = m.start(block) % m.channels; i < BLOCK; ++i, c = c + 1 == m.channels ? 0 : c + 1)
            to[interleaved<T> ? i / 2 + i % 2 * LANES : i] = source(c);
}

// A vector's numbers in the order of their columns.
template <typename T>
inline void put(float* to, Pair pair) {
    float numbers[BLOCK];
    store(numbers, pair);
    for (int i = 0; i < LANES; ++i) {
        to[interleaved<T> ? 2 * i : i] = numbers[i];
        to[interleaved<T> ? 2 * i + 1 : LANES + i] = numbers[LANES + i];
    }
}

inline Pair vectors(const float* spread_out, int64_t block) { return load(spread_out + block * BLOCK); }

// Means of a chunk's columns, less the reference, and sums of squared differences from them.
template <typename T, int COUNT>
void moments_of(const T* x, const Matrix& m, int64_t block, int64_t rows, const float* reference, float* means,
                float* squares) {
    Pair first[COUNT], sum[COUNT] = {}, square[COUNT] = {};
    const T* column[COUNT];
    for (int b = 0; b < COUNT; ++b) first[b] = load(column[b] = x + m.start(block + b));
    for (int64_t row = 0; row < rows; ++row)
        for (int b = 0; b < COUNT; ++b) {
            const Pair value = load(column[b] + row * m.width);
            const Number p = value.a - first[b].a, q = value.b - first[b].b;
            sum[b].a += p;
            sum[b].b += q;
            square[b].a += p * p;
            square[b].b += q * q;
        }
    const float share = 1.0f / rows;
    for (int b = 0; b < COUNT; ++b) {
        const Pair base = vectors(reference, block + b);
        const Number p = sum[b].a * share, q = sum[b].b * share;
        put<T>(means + m.start(block + b), {first[b].a - base.a + p, first[b].b - base.b + q});
        put<T>(squares + m.start(block + b), {square[b].a - p * sum[b].a, square[b].b - q * sum[b].b});
    }
}

// Sums of a chunk's columns: of g, and of g * (x - mean).
template <typename T, bool RELU, int COUNT>
void sums_of(const T* x, const T* dy, const Matrix& m, int64_t block, int64_t rows, const float* scales,
             const float* shifts, const float* means, float* sums, float* products) {
    Pair sum[COUNT] = {}, product[COUNT] = {}, scale[COUNT], shift[COUNT], mean[COUNT];
    for (int b = 0; b < COUNT; ++b) {
        scale[b] = vectors(scales, block + b);
        shift[b] = vectors(shifts, block + b);
        mean[b] = vectors(means, block + b);
    }
    for (int64_t row = 0; row < rows; ++row)
        for (int b = 0; b < COUNT; ++b) {
            const int64_t at = row * m.width + m.start(block + b);
            Pair value = load(x + at), g = load(dy + at);
            value = {value.a - mean[b].a, value.b - mean[b].b};
            if (RELU) {
                g.a = where_open(value.a * scale[b].a + shift[b].a, g.a);
                g.b = where_open(value.b * scale[b].b + shift[b].b, g.b);
            }
            sum[b].a += g.a;
            sum[b].b += g.b;
            product[b].a += g.a * value.a;
            product[b].b += g.b * value.b;
        }
    for (int b = 0; b < COUNT; ++b) {
        put<T>(sums + m.start(block + b), sum[b]);
        put<T>(products + m.start(block + b), product[b]);
    }
}

template <typename T, bool RELU>
void outputs_of(const T* x, T* y, const Matrix& m, int64_t rows, const float* scales, const float* shifts,
                const float* means) {
    for (int64_t row = 0; row < rows; ++row, x += m.width, y += m.width)
        for (int64_t block = 0; block < m.blocks; ++block) {
            const Pair scale = vectors(scales, block), shift = vectors(shifts, block), mean = vectors(means, block);
            Pair value = load(x + m.start(block));
            value.a = (value.a - mean.a) * scale.a + shift.a;
            value.b = (value.b - mean.b) * scale.b + shift.b;
            if (RELU) value = {clamped(value.a), clamped(value.b)};
            store(y + m.start(block), value);
        }
}

// dx = scale * g + slope * (x - mean) + level
template <typename T, bool RELU>
void gradients_of(const T* x, const T* dy, T* dx, const Matrix& m, int64_t rows, const float* scales,
                  const float* shifts, const float* means, const float* slopes, const float* levels) {
    for (int64_t row = 0; row < rows; ++row, x += m.width, dy += m.width, dx += m.width)
        for (int64_t block = 0; block < m.blocks; ++block) {
            const Pair scale = vectors(scales, block), shift = vectors(shifts, block);
            const Pair slope = vectors(slopes, block), level = vectors(levels, block), mean = vectors(means, block);
            Pair value = load(x + m.start(block)), g = load(dy + m.start(block));
            value = {value.a - mean.a, value.b - mean.b};
            if (RELU) {
                g.a = where_open(value.a * scale.a + shift.a, g.a);
                g.b = where_open(value.b * scale.b + shift.b, g.b);
            }
            store(dx + m.start(block), {scale.a * g.a + (slope.a * value.a + level.a),
                                        scale.b * g.b + (slope.b * value.b + level.b)});
        }
}

struct Share {
    int64_t first, last;  // chunks of one thread
};

inline Share share_of(int64_t chunks) {
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {chunks * thread / threads, chunks * (thread + 1) / threads};
#else
    return {0, chunks};
#endif
}

inline int threads_for(const Matrix& m, int threads) {
    return m.rows * m.width < SHARED ? 1 : (int)std::max<int64_t>(1, std::min<int64_t>(threads, m.chunks));
}

inline std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

struct Saved {
    double *mean, *inverse, *scale, *shift;  // of (4, channels); inverse: of the standard deviation; shift: the bias

    Saved(double* saved, int64_t c) : mean(saved), inverse(saved + c), scale(saved + 2 * c), shift(saved + 3 * c) {}
};

struct Settings {
    double momentum, epsilon;
};

template <typename T, bool RELU>
void forward(const T* x, T* y, const Matrix& m, const float* weight, const float* bias, float* running_mean,
             float* running_variance, const Saved& saved, const Settings& settings, int threads) {
    const int64_t channels = m.channels, vectors = m.blocks * BLOCK;
    const auto partial = floats(2 * m.chunks * m.stride), spread_out = floats(4 * vectors);
    float *const reference = spread_out.get(), *const scales = reference + vectors, *const shifts = scales + vectors;
    float* const means_of_all = shifts + vectors;
    const T* const rest = x + m.rows * m.width;
    spread<T>(m, [&](int64_t c) { return as_float(x[c]); }, reference);

    // few numbers, by one thread, in one order
    const auto combine = [&] {
        for (int64_t begin = 0; begin < channels; begin += GROUP) {
            const int64_t count = std::min(GROUP, channels - begin);
            double mean[GROUP] = {}, square[GROUP] = {};
            for (int64_t index = 0; index < m.chunks; ++index)
                for (int64_t f = 0; f < m.fold; ++f) {
                    const float* const means = partial.get() + 2 * index * m.stride + f * channels + begin;
                    for (int64_t c = 0; c < count; ++c) mean[c] += (double)m.count(index) * means[c];
                }
            for (int64_t row = 0; row < m.rest; ++row)
                for (int64_t c = 0; c < count; ++c)
                    mean[c] += (double)as_float(rest[row * channels + begin + c]) - as_float(x[begin + c]);
            for (int64_t c = 0; c < count; ++c) mean[c] /= m.all_rows();
            for (int64_t index = 0; index < m.chunks; ++index)
                for (int64_t f = 0; f < m.fold; ++f) {
                    const float* const means = partial.get() + 2 * index * m.stride + f * channels + begin;
                    for (int64_t c = 0; c < count; ++c) {
                        const double off = means[c] - mean[c];
                        square[c] += means[c + m.stride] + m.count(index) * off * off;
                    }
                }
            for (int64_t row = 0; row < m.rest; ++row)
                for (int64_t c = 0; c < count; ++c) {
                    const double value = as_float(rest[row * channels + begin + c]);
                    const double off = value - as_float(x[begin + c]) - mean[c];
                    square[c] += off * off;
                }
            for (int64_t c = 0; c < count; ++c) {
                const int64_t at = begin + c;
                // not std::max, which would make a number of what is none
                const double sum = square[c] < 0 ? 0 : square[c], off = mean[c] + as_float(x[at]);
                saved.mean[at] = off;
                saved.inverse[at] = 1 / std::sqrt(sum / m.all_rows() + settings.epsilon);
                saved.scale[at] = clean(weight[at] * saved.inverse[at]);
                saved.shift[at] = clean(bias[at] - (off - (float)off) * saved.scale[at]);
                if (running_mean) {
                    const double unbiased = sum / (m.all_rows() - 1), kept = 1 - settings.momentum;
                    running_mean[at] = (float)(kept * running_mean[at] + settings.momentum * off);
                    running_variance[at] = (float)(kept * running_variance[at] + settings.momentum * unbiased);
                }
            }
        }
        spread<T>(m, [&](int64_t c) { return (float)saved.scale[c]; }, scales);
        spread<T>(m, [&](int64_t c) { return (float)saved.shift[c]; }, shifts);
        spread<T>(m, [&](int64_t c) { return (float)saved.mean[c]; }, means_of_all);
        for (int64_t i = 0; i < m.rest * channels; ++i) {
            const int64_t c = i % channels;
            const float off = as_float(rest[i]) - (float)saved.mean[c];
            const float value = off * (float)saved.scale[c] + (float)saved.shift[c];
            set(y[m.rows * m.width + i], RELU && value < 0 ? 0 : value);
        }
    };

#pragma omp parallel num_threads(threads)
    {
        const Share own = share_of(m.chunks);
        for (int64_t index = own.first; index < own.last; ++index) {
            const T* const chunk = x + index * m.chunk * m.width;
            float *const means = partial.get() + 2 * index * m.stride, *const squares = means + m.stride;
            int64_t block = 0;
            for (; block + WIDE <= m.blocks; block += WIDE)
                moments_of<T, WIDE>(chunk, m, block, m.count(index), reference, means, squares);
            for (; block < m.blocks; ++block)
                moments_of<T, 1>(chunk, m, block, m.count(index), reference, means, squares);
        }
#pragma omp barrier
#pragma omp single
        combine();
        for (int64_t index = own.last - 1; index >= own.first; --index) {
            const int64_t at = index * m.chunk * m.width;
            outputs_of<T, RELU>(x + at, y + at, m, m.count(index), scales, shifts, means_of_all);
        }
    }
}

template <typename T, bool RELU>
void backward(const T* x, const T* dy, T* dx, const Matrix& m, const Saved& saved, float* of_weight, float* of_bias,
              int threads) {
    const int64_t channels = m.channels, vectors = m.blocks * BLOCK;
    const auto partial = floats(2 * m.chunks * m.stride), spread_out = floats(5 * vectors), lines = floats(2 * channels);
    float *const scales = spread_out.get(), *const shifts = scales + vectors, *const means = shifts + vectors;
    float *const slopes = means + vectors, *const levels = slopes + vectors;
    const int64_t rest = m.rows * m.width;
    spread<T>(m, [&](int64_t c) { return (float)saved.scale[c]; }, scales);
    spread<T>(m, [&](int64_t c) { return (float)saved.shift[c]; }, shifts);
    spread<T>(m, [&](int64_t c) { return (float)saved.mean[c]; }, means);
    const auto gradient = [&](int64_t at, int64_t c) {
        const float y = (as_float(x[at]) - (float)saved.mean[c]) * (float)saved.scale[c] + (float)saved.shift[c];
        return RELU && y <= 0 ? 0.0f : as_float(dy[at]);
    };

    const auto combine = [&] {
        for (int64_t begin = 0; begin < channels; begin += GROUP) {
            const int64_t count = std::min(GROUP, channels - begin);
            double sum[GROUP] = {}, product[GROUP] = {};
            for (int64_t index = 0; index < m.chunks; ++index)
                for (int64_t f = 0; f < m.fold; ++f) {
                    const float* const sums = partial.get() + 2 * index * m.stride + f * channels + begin;
                    for (int64_t c = 0; c < count; ++c) {
                        sum[c] += sums[c];
                        product[c] += sums[c + m.stride];
                    }
                }
            for (int64_t row = 0; row < m.rest; ++row)
                for (int64_t c = 0; c < count; ++c) {
                    const int64_t at = rest + row * channels + begin + c;
                    const float g = gradient(at, begin + c);
                    sum[c] += g;
                    product[c] += g * ((double)as_float(x[at]) - (float)saved.mean[begin + c]);
                }
            for (int64_t c = 0; c < count; ++c) {
                const int64_t at = begin + c;
                const double mean = saved.mean[at], inverse = saved.inverse[at];
                product[c] -= (mean - (float)mean) * sum[c];  // sums were around the mean as a float
                of_bias[at] = (float)sum[c];
                of_weight[at] = (float)(product[c] * inverse);
                const double slope = -saved.scale[at] * inverse * inverse * product[c] / m.all_rows();
                lines[at] = clean(slope);
                lines[channels + at] = clean(-saved.scale[at] * sum[c] / m.all_rows() - lines[at] * (mean - (float)mean));
            }
        }
        if (!dx) return;
        spread<T>(m, [&](int64_t c) { return lines[c]; }, slopes);
        spread<T>(m, [&](int64_t c) { return lines[channels + c]; }, levels);
        for (int64_t i = 0; i < m.rest * channels; ++i) {
            const int64_t c = i % channels, at = rest + i;
            set(dx[at], (float)saved.scale[c] * gradient(at, c) +
                            (lines[c] * (as_float(x[at]) - (float)saved.mean[c]) + lines[channels + c]));
        }
    };

#pragma omp parallel num_threads(threads)
    {
        const Share own = share_of(m.chunks);
        for (int64_t index = own.first; index < own.last; ++index) {
            const int64_t at = index * m.chunk * m.width;
            float *const sums = partial.get() + 2 * index * m.stride, *const products = sums + m.stride;
            int64_t block = 0;
            for (; block + WIDE / 2 <= m.blocks; block += WIDE / 2)
                sums_of<T, RELU, WIDE / 2>(x + at, dy + at, m, block, m.count(index), scales, shifts, means, sums,
                                           products);
            for (; block < m.blocks; ++block)
                sums_of<T, RELU, 1>(x + at, dy + at, m, block, m.count(index), scales, shifts, means, sums, products);
        }
#pragma omp barrier
#pragma omp single
        combine();
        for (int64_t index = own.last - 1; dx && index >= own.first; --index) {
            const int64_t at = index * m.chunk * m.width;
            gradients_of<T, RELU>(x + at, dy + at, dx + at, m, m.count(index), scales, shifts, means, slopes, levels);
        }
    }
}

}  // namespace

// Rows are pixels of all images. saved: (4, channels). Running statistics may be none, and so may dx, where nobody asks.
extern "C" {

void earlybird_batch_norm(const void* x, void* y, int64_t rows, int64_t channels, const float* weight,
                          const float* bias, float* running_mean, float* running_variance, double* saved,
                          double momentum, double epsilon, int relu, int is_brain, int threads) {
    const Matrix m(rows, channels);
    const auto run = [&](auto kernel, auto from, auto to) {
        kernel(from, to, m, weight, bias, running_mean, running_variance, Saved(saved, channels),
               Settings{momentum, epsilon}, threads_for(m, threads));
    };
    if (is_brain)
        run(relu ? forward<Brain, true> : forward<Brain, false>, (const Brain*)x, (Brain*)y);
    else
        run(relu ? forward<float, true> : forward<float, false>, (const float*)x, (float*)y);
}

void earlybird_batch_norm_backward(const void* x, const void* dy, void* dx, int64_t rows, int64_t channels,
                                   double* saved, float* of_weight, float* of_bias, int relu, int is_brain,
                                   int threads) {
    const Matrix m(rows, channels);
    const auto run = [&](auto kernel, auto from, auto gradient, auto to) {
        kernel(from, gradient, to, m, Saved(saved, channels), of_weight, of_bias, threads_for(m, threads));
    };
    if (is_brain)
        run(relu ? backward<Brain, true> : backward<Brain, false>, (const Brain*)x, (const Brain*)dy, (Brain*)dx);
    else
        run(relu ? backward<float, true> : backward<float, false>, (const float*)x, (const float*)dy, (float*)dx);
}
}
