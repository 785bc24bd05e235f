// Convolutions and linear layers on a CPU whose weight is a union of dense blocks: some outputs times some columns each.
//
//   y[p, o] = bias[o] + sum over the columns (tap, c) of the block of o of w[o, tap, c] * x[pixel(p, tap), c]
//
// It is blocked like a matrix product, and nothing is unfolded or gathered: an input row is a pointer to the channels of
// one pixel, and a pixel outside the image points to zeros. A block is cut into panels of BLOCKS vectors of outputs; a
// tile of positions shares the vectors of a panel, one for each of its columns, and the sums stay in registers. Of
// bfloat16, two columns are multiplied at a time, which need not lie side by side; they have the same tap.
//
// Images are laid out (batch, height, width, channels). Every number is written by one thread, which adds in a fixed
// order, so that results do not depend on the number of threads. Vectors are GCC's and Clang's own, as long as the
// machine's.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define HAS_BRAIN 1
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, SUMS = 24;  // SUMS: vectors of sums that fit into registers beside what they are made of
#elif defined(__AVX__)
constexpr int BYTES = 32, SUMS = 12;
#else
constexpr int BYTES = 16, SUMS = 12;
#endif
constexpr int LANES = BYTES / sizeof(float);
constexpr int64_t CHUNK = 192;  // positions that a thread takes at a time, for which a panel stays in its cache

typedef uint16_t Brain;  // bfloat16, as bits
typedef float Number __attribute__((vector_size(BYTES)));

struct Pair {
    int64_t y, x;
};

struct Shape {
    int64_t batch, channels, outputs;
    Pair image, map, kernel, stride, padding, dilation;  // map: height and width of the output
};

struct Panel {
    int64_t weights, columns, ends, rows;  // where its own begin in the arrays of all panels
    int64_t outputs, blocks;               // outputs: of its blocks * LANES those that are there
};

template <typename T> struct Operands {
    const T* x;
    const T* weights;
    const int32_t* columns;
    const int64_t* ends;  // for each panel and tap, where its columns end
    const int64_t* rows;  // which output each row of a panel is
    const float* bias;    // may be null
    T* y;
};

template <typename T> constexpr int STEP = sizeof(T) == 2 ? 2 : 1;  // columns that are multiplied at a time

// What one tap adds: columns first .. last of a panel times P pixels. Returns where the weights go on.
template <int B, int P>
inline const float* add_tap(const float* const* pixels, const float* w, const int32_t* columns, int64_t count,
                            Number (*sums)[B]) {
    const float* row[P];
    for (int p = 0; p < P; ++p) row[p] = pixels[p];
    for (int64_t k = 0; k < count; ++k, w += B * LANES) {
        const int64_t c = columns[k];
        Number f[B];
        for (int b = 0; b < B; ++b) std::memcpy(&f[b], w + b * LANES, BYTES);
        for (int p = 0; p < P; ++p)
            for (int b = 0; b < B; ++b) sums[p][b] += f[b] * row[p][c];
    }
    return w;
}

#if HAS_BRAIN
template <int B, int P>
inline const Brain* add_tap(const Brain* const* pixels, const Brain* w, const int32_t* columns, int64_t count,
                            Number (*sums)[B]) {
    const Brain* row[P];
    for (int p = 0; p < P; ++p) row[p] = pixels[p];
    for (int64_t k = 0; k < count; k += 2, w += B * 2 * LANES) {
        const int64_t even = columns[k], odd = columns[k + 1];
        __m512bh f[B];
        for (int b = 0; b < B; ++b) std::memcpy(&f[b], w + b * 2 * LANES, BYTES);
        for (int p = 0; p < P; ++p) {
            const uint32_t both = row[p][even] | (uint32_t)row[p][odd] << 16;
            const __m512bh pixel = (__m512bh)_mm512_set1_epi32((int32_t)both);
            for (int b = 0; b < B; ++b) sums[p][b] = (Number)_mm512_dpbf16_ps((__m512)sums[p][b], f[b], pixel);
        }
    }
    return w;
}
#endif

inline void put(float* to, float value) { *to = value; }

inline void put(Brain* to, float value) {  // to the nearest, to even in the middle
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool none = (bits & 0x7fffffff) > 0x7f800000;
    *to = none ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <typename T, int B, int P>
void tile(const Operands<T>& of, const Panel& panel, const Shape& s, const T* const* pixels, int64_t first,
          int64_t count) {
    const int64_t taps = s.kernel.y * s.kernel.x;
    const int64_t* ends = of.ends + panel.ends;
    const int32_t* columns = of.columns + panel.columns;
    const T* w = of.weights + panel.weights;
    Number sums[P][B] = {};
    for (int64_t tap = 0, k = 0; tap < taps; k = ends[tap++])
        w = add_tap<B, P>(pixels + tap * P, w, columns + k, ends[tap] - k, sums);
    alignas(BYTES) float found[B * LANES];
    const int64_t* rows = of.rows + panel.rows;
    const bool in_a_row = rows[panel.outputs - 1] - rows[0] == panel.outputs - 1;  // they are in order
    for (int64_t p = 0; p < count; ++p) {
        for (int b = 0; b < B; ++b) std::memcpy(found + b * LANES, &sums[p][b], BYTES);
        if (of.bias)
            for (int64_t o = 0; o < panel.outputs; ++o) found[o] += of.bias[rows[o]];
        T* y = of.y + (first + p) * s.outputs;
        if (in_a_row)
            for (int64_t o = 0; o < panel.outputs; ++o) put(y + rows[0] + o, found[o]);
        else
            for (int64_t o = 0; o < panel.outputs; ++o) put(y + rows[o], found[o]);
    }
}

// Where the channels of each pixel lie that the positions of a tile see: (taps, width of the tile).
template <typename T>
void find_pixels(const T* x, const Shape& s, const T* zeros, int64_t first, int64_t width, const T** pixels) {
    const int64_t positions = s.batch * s.map.y * s.map.x;
    for (int64_t p = 0; p < width; ++p) {
        const int64_t position = std::min(first + p, positions - 1);
        const int64_t column = position % s.map.x, line = position / s.map.x % s.map.y;
        const T* image = x + position / (s.map.x * s.map.y) * s.image.y * s.image.x * s.channels;
        const T** to = pixels + p;
        for (int64_t i = 0; i < s.kernel.y; ++i)
            for (int64_t j = 0; j < s.kernel.x; ++j, to += width) {
                const int64_t h = line * s.stride.y - s.padding.y + i * s.dilation.y;
                const int64_t w = column * s.stride.x - s.padding.x + j * s.dilation.x;
                const bool inside = h >= 0 && h < s.image.y && w >= 0 && w < s.image.x;
                *to = inside ? image + (h * s.image.x + w) * s.channels : zeros;
            }
    }
}

template <typename T, int B, int P>
void panels_of(const Operands<T>& of, const Panel* panels, int64_t number, const Shape& s, const T* zeros,
               int64_t first, int64_t last, std::vector<const T*>& pixels) {
    const int64_t taps = s.kernel.y * s.kernel.x, tiles = (last - first) / P;
    pixels.resize(std::max<int64_t>(tiles, 1) * taps * P);
    for (int64_t t = 0; t < tiles; ++t) find_pixels(of.x, s, zeros, first + t * P, P, pixels.data() + t * taps * P);
    for (int64_t n = 0; n < number; ++n)
        if (panels[n].blocks == B)
            for (int64_t t = 0; t < tiles; ++t)
                tile<T, B, P>(of, panels[n], s, pixels.data() + t * taps * P, first + t * P, P);
    first += tiles * P;
    if (first == last) return;
    if constexpr (P > 4) {
        if (last - first <= P / 3) return panels_of<T, B, P / 3>(of, panels, number, s, zeros, first, last, pixels);
    } else if constexpr (P > 1) {
        if (last - first == 1) return panels_of<T, B, 1>(of, panels, number, s, zeros, first, last, pixels);
    }
    find_pixels(of.x, s, zeros, first, P, pixels.data());
    for (int64_t n = 0; n < number; ++n)
        if (panels[n].blocks == B) tile<T, B, P>(of, panels[n], s, pixels.data(), first, last - first);
}

template <typename T>
void multiply(const Operands<T>& of, const Panel* panels, int64_t number, const Shape& s, int threads) {
    const int64_t positions = s.batch * s.map.y * s.map.x, chunks = (positions + CHUNK - 1) / CHUNK;
    // where there are few positions, panels are shared among the threads
    const int64_t groups = chunks >= 2 * threads ? 1 : std::min<int64_t>(number, 4 * threads);
    const std::vector<T> zeros(s.channels);
#pragma omp parallel num_threads(threads)
    {
        std::vector<const T*> pixels;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t first = chunk * CHUNK, last = std::min(first + CHUNK, positions);
                const int64_t from = number * group / groups, to = number * (group + 1) / groups;
                bool has[5] = {};
                for (int64_t n = from; n < to; ++n) has[panels[n].blocks] = true;
                const Panel* own = panels + from;
                if (has[1]) panels_of<T, 1, SUMS / 2>(of, own, to - from, s, zeros.data(), first, last, pixels);
                if (has[2]) panels_of<T, 2, SUMS / 2>(of, own, to - from, s, zeros.data(), first, last, pixels);
                if (has[4]) panels_of<T, 4, SUMS / 4>(of, own, to - from, s, zeros.data(), first, last, pixels);
            }
    }
}

}  // namespace

// sizes: batch, channels, outputs, then height and width of image, map, kernel, stride, padding and dilation.
// Weights of a panel: for each of its columns (of bfloat16: for two of them, in turns) blocks * LANES numbers; what is
// beyond its outputs is zeros. The columns of a tap follow each other; of bfloat16 there is an even number of them.
extern "C" {

int64_t earlybird_lanes() { return LANES; }

int64_t earlybird_has_bfloat16() {
#if HAS_BRAIN
    return 1;
#else
    return 0;
#endif
}

void earlybird_multiply(const void* x, const void* weights, const int32_t* columns, const int64_t* ends,
                        const int64_t* rows, const float* bias, void* y, const Panel* panels, int64_t number,
                        const Shape* sizes, int is_bfloat16, int threads) {
#if HAS_BRAIN
    if (is_bfloat16)
        return multiply<Brain>({(const Brain*)x, (const Brain*)weights, columns, ends, rows, bias, (Brain*)y}, panels,
                               number, *sizes, threads);
#endif
    multiply<float>({(const float*)x, (const float*)weights, columns, ends, rows, bias, (float*)y}, panels, number,
                    *sizes, threads);
}
}
