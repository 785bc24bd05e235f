// Add layers on a CPU: sums of distances, and the gradient of their input.
//
//   distances:       y[p, o] = -sum over taps and channels of |x[p, tap, c] - f[o, tap, c]|
//   input gradient: dx[q, c] = sum over taps and outputs of clip(f[o, tap, c] - x[q, c], -1, 1) * g[p(q, tap), o]
//
// with p positions of the output and q of the input. Both are blocked like a matrix product: POSITIONS rows share one
// vector of filters, and the sums stay in registers until they are done. Nothing is unfolded: a row is a pointer to the
// channels of one pixel, and a row outside the image points to zeros. Every number is written by one thread, which adds
// in a fixed order, so that results do not depend on the number of threads.
//
// Images are laid out (batch, height, width, channels). Vectors are GCC's and Clang's own, as long as the machine's.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, POSITIONS = 8;
#elif defined(__AVX__)
constexpr int BYTES = 32, POSITIONS = 4;
#else
constexpr int BYTES = 16, POSITIONS = 4;
#endif
constexpr int64_t TILES = 32;  // tiles of POSITIONS that one thread takes at a time, for which filters stay in its cache

template <typename T> struct Vectors;
template <> struct Vectors<float> {
    typedef float Number __attribute__((vector_size(BYTES)));
    typedef int32_t Bits __attribute__((vector_size(BYTES)));
    static constexpr int32_t unsigned_bits = 0x7fffffff;
};
template <> struct Vectors<double> {
    typedef double Number __attribute__((vector_size(BYTES)));
    typedef int64_t Bits __attribute__((vector_size(BYTES)));
    static constexpr int64_t unsigned_bits = 0x7fffffffffffffff;
};

template <typename T> constexpr int LANES = BYTES / sizeof(T);

// GCC makes a comparison and a masked move of what is one instruction each. Where d is not a number, it stays none.
#if defined(__AVX512F__)
inline __m512 clip(__m512 d) { return _mm512_max_ps(_mm512_set1_ps(-1), _mm512_min_ps(_mm512_set1_ps(1), d)); }
inline __m512d clip(__m512d d) { return _mm512_max_pd(_mm512_set1_pd(-1), _mm512_min_pd(_mm512_set1_pd(1), d)); }
#elif defined(__AVX__)
inline __m256 clip(__m256 d) { return _mm256_max_ps(_mm256_set1_ps(-1), _mm256_min_ps(_mm256_set1_ps(1), d)); }
inline __m256d clip(__m256d d) { return _mm256_max_pd(_mm256_set1_pd(-1), _mm256_min_pd(_mm256_set1_pd(1), d)); }
#else
template <typename Number>
inline Number clip(Number d) {
    const Number one = Number{} + 1;
    d = d > one ? one : d;
    return d < -one ? -one : d;
}
#endif

struct Pair {
    int64_t y, x;
};

struct Shape {
    int64_t batch, channels, outputs;
    Pair image, map, kernel, stride, padding, dilation;  // map: height and width of the output
};

template <typename T, int BLOCKS>
inline void sum_distances(const T* const* rows, const T* filters, int64_t block, int64_t taps, int64_t channels,
                          T (*sums)[BLOCKS * LANES<T>]) {
    typedef typename Vectors<T>::Number Number;
    typedef typename Vectors<T>::Bits Bits;
    Number sum[POSITIONS][BLOCKS] = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
        const T* row[POSITIONS];
        for (int p = 0; p < POSITIONS; ++p) row[p] = rows[tap * POSITIONS + p];
        for (int64_t c = 0; c < channels; ++c, filters += LANES<T>) {
            Number f[BLOCKS];
            for (int b = 0; b < BLOCKS; ++b) std::memcpy(&f[b], filters + b * block, BYTES);
            for (int p = 0; p < POSITIONS; ++p)
                for (int b = 0; b < BLOCKS; ++b) {
                    const Number difference = f[b] - row[p][c];
                    sum[p][b] += (Number)((Bits)difference & Vectors<T>::unsigned_bits);
                }
        }
    }
    for (int p = 0; p < POSITIONS; ++p)
        for (int b = 0; b < BLOCKS; ++b) std::memcpy(&sums[p][b * LANES<T>], &sum[p][b], BYTES);
}

template <typename T, int BLOCKS>
void distances_of(const T* x, const T* filters, T* y, const Shape& s, const T* zeros, int64_t first_tile,
                  int64_t last_tile, int64_t first_block) {
    const int64_t taps = s.kernel.y * s.kernel.x, positions = s.batch * s.map.y * s.map.x;
    const int64_t block = taps * s.channels * LANES<T>, first_output = first_block * LANES<T>;
    const int64_t outputs = std::min<int64_t>(BLOCKS * LANES<T>, s.outputs - first_output);
    std::vector<const T*> rows(taps * POSITIONS);
    T sums[POSITIONS][BLOCKS * LANES<T>];
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t first = tile * POSITIONS, count = std::min<int64_t>(POSITIONS, positions - first);
        for (int p = 0; p < POSITIONS; ++p) {
            const int64_t position = std::min(first + p, positions - 1);
            const int64_t column = position % s.map.x, line = position / s.map.x % s.map.y;
            const T* image = x + position / (s.map.x * s.map.y) * s.image.y * s.image.x * s.channels;
            for (int64_t i = 0; i < s.kernel.y; ++i)
                for (int64_t j = 0; j < s.kernel.x; ++j) {
                    const int64_t h = line * s.stride.y - s.padding.y + i * s.dilation.y;
                    const int64_t w = column * s.stride.x - s.padding.x + j * s.dilation.x;
                    const bool inside = h >= 0 && h < s.image.y && w >= 0 && w < s.image.x;
                    rows[(i * s.kernel.x + j) * POSITIONS + p] =
                        inside ? image + (h * s.image.x + w) * s.channels : zeros;
                }
        }
        sum_distances<T, BLOCKS>(rows.data(), filters + first_block * block, block, taps, s.channels, sums);
        for (int64_t p = 0; p < count; ++p)
            for (int64_t o = 0; o < outputs; ++o) y[(first + p) * s.outputs + first_output + o] = -sums[p][o];
    }
}

template <typename T>
void distances(const T* x, const T* filters, T* y, const Shape& s, int threads) {
    const int64_t tiles = (s.batch * s.map.y * s.map.x + POSITIONS - 1) / POSITIONS;
    const int64_t chunks = (tiles + TILES - 1) / TILES, blocks = (s.outputs + LANES<T> - 1) / LANES<T>;
    const std::vector<T> zeros(s.channels);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t pair = 0; pair < (blocks + 1) / 2; ++pair)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t first = chunk * TILES, last = std::min(first + TILES, tiles);
            if (2 * pair + 1 < blocks)
                distances_of<T, 2>(x, filters, y, s, zeros.data(), first, last, 2 * pair);
            else
                distances_of<T, 1>(x, filters, y, s, zeros.data(), first, last, 2 * pair);
        }
}

// What one tap adds to the gradient of POSITIONS pixels, LANES channels each.
template <typename T>
inline void add_tap(const typename Vectors<T>::Number* x, const T* filters, const T* const* rows, int64_t outputs,
                    typename Vectors<T>::Number* sums) {
    typename Vectors<T>::Number pixel[POSITIONS], sum[POSITIONS];
    const T* row[POSITIONS];
    for (int p = 0; p < POSITIONS; ++p) pixel[p] = x[p], sum[p] = sums[p], row[p] = rows[p];
    for (int64_t o = 0; o < outputs; ++o, filters += LANES<T>) {
        typename Vectors<T>::Number f;
        std::memcpy(&f, filters, BYTES);
        for (int p = 0; p < POSITIONS; ++p) sum[p] += clip(f - pixel[p]) * row[p][o];
    }
    for (int p = 0; p < POSITIONS; ++p) sums[p] = sum[p];
}

// Pixels of one tile, all with the same remainder by the stride, so that the same taps reach them.
template <typename T>
void input_gradient_of(const T* x, const T* filters, const T* g, T* dx, const Shape& s, const T* zeros, Pair remainder,
                       Pair extent, int64_t tile, int64_t block) {
    typedef typename Vectors<T>::Number Number;
    const int64_t pixels = s.batch * extent.y * extent.x, first = tile * POSITIONS;
    const int64_t first_channel = block * LANES<T>, taps = s.kernel.y * s.kernel.x;
    const int64_t channels = std::min<int64_t>(LANES<T>, s.channels - first_channel);
    const int64_t count = std::min<int64_t>(POSITIONS, pixels - first);
    int64_t image[POSITIONS], line[POSITIONS], column[POSITIONS], offset[POSITIONS];
    Number pixel[POSITIONS] = {}, sums[POSITIONS] = {};
    for (int p = 0; p < POSITIONS; ++p) {
        const int64_t q = std::min(first + p, pixels - 1);
        image[p] = q / (extent.x * extent.y);
        line[p] = q / extent.x % extent.y * s.stride.y + remainder.y;
        column[p] = q % extent.x * s.stride.x + remainder.x;
        offset[p] = ((image[p] * s.image.y + line[p]) * s.image.x + column[p]) * s.channels + first_channel;
        std::memcpy(&pixel[p], x + offset[p], channels * sizeof(T));
    }
    for (int64_t i = 0; i < s.kernel.y; ++i)
        for (int64_t j = 0; j < s.kernel.x; ++j) {
            const int64_t top = s.padding.y - i * s.dilation.y, left = s.padding.x - j * s.dilation.x;
            if ((remainder.y + top) % s.stride.y || (remainder.x + left) % s.stride.x) continue;
            const T* rows[POSITIONS];
            for (int p = 0; p < POSITIONS; ++p) {
                const int64_t h = line[p] + top, w = column[p] + left;
                const bool inside = h >= 0 && w >= 0 && h / s.stride.y < s.map.y && w / s.stride.x < s.map.x;
                const int64_t position = (image[p] * s.map.y + h / s.stride.y) * s.map.x + w / s.stride.x;
                rows[p] = inside ? g + position * s.outputs : zeros;
            }
            const T* tap = filters + (block * taps + i * s.kernel.x + j) * s.outputs * LANES<T>;
            add_tap<T>(pixel, tap, rows, s.outputs, sums);
        }
    for (int64_t p = 0; p < count; ++p) std::memcpy(dx + offset[p], &sums[p], channels * sizeof(T));
}

template <typename T>
void input_gradient(const T* x, const T* filters, const T* g, T* dx, const Shape& s, int threads) {
    const int64_t blocks = (s.channels + LANES<T> - 1) / LANES<T>;
    const std::vector<T> zeros(s.outputs);
    for (int64_t i = 0; i < std::min(s.stride.y, s.image.y); ++i)
        for (int64_t j = 0; j < std::min(s.stride.x, s.image.x); ++j) {
            const Pair extent{(s.image.y - i + s.stride.y - 1) / s.stride.y,
                              (s.image.x - j + s.stride.x - 1) / s.stride.x};
            const int64_t tiles = (s.batch * extent.y * extent.x + POSITIONS - 1) / POSITIONS;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
            for (int64_t block = 0; block < blocks; ++block)
                for (int64_t tile = 0; tile < tiles; ++tile)
                    input_gradient_of<T>(x, filters, g, dx, s, zeros.data(), Pair{i, j}, extent, tile, block);
        }
}

}  // namespace

// sizes: batch, channels, outputs, then height and width of image, map, kernel, stride, padding and dilation.
// Filters: blocks of LANES outputs, then (taps, channels, LANES) each; for the gradient blocks of LANES channels, then
// (taps, outputs, LANES) each. The last block is filled up with zeros.
extern "C" {

int64_t earlybird_lanes(int is_double) { return is_double ? LANES<double> : LANES<float>; }

void earlybird_distances(const void* x, const void* filters, void* y, const Shape* sizes, int is_double, int threads) {
    if (is_double)
        distances((const double*)x, (const double*)filters, (double*)y, *sizes, threads);
    else
        distances((const float*)x, (const float*)filters, (float*)y, *sizes, threads);
}

void earlybird_input_gradient(const void* x, const void* filters, const void* g, void* dx, const Shape* sizes,
                              int is_double, int threads) {
    if (is_double)
        input_gradient((const double*)x, (const double*)filters, (const double*)g, (double*)dx, *sizes, threads);
    else
        input_gradient((const float*)x, (const float*)filters, (const float*)g, (float*)dx, *sizes, threads);
}
}
