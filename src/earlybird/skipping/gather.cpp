// Rows of a batch on a CPU: put some in the places of others, and what a block's change was worth to each.
//
//   merge:  out[j] = values[i] where rows[i] = j, else rest[j]
//   worth:  worth[i] = sum of (outputs[i] - inputs[i]) * gradient[rows[i]]
//
// A row is one sample, dense, in whatever order its numbers lie, the same for all operands. Each is read once, and
// written or summed by one thread in a fixed order: no result depends on the number of threads.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 16;    // sums side by side
constexpr int64_t CHUNK = 1024;  // numbers that are summed in float; chunks are put together in double

inline float number(float x) { return x; }

inline float number(uint16_t brain) {  // bfloat16, as bits
    uint32_t bits = uint32_t(brain) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

template <typename T>
double product(const T* outputs, const T* inputs, const T* gradient, int64_t count) {
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
        const int64_t end = begin + CHUNK < count ? begin + CHUNK : count;
        float sums[LANES] = {};
        int64_t at = begin;
        for (; at + LANES <= end; at += LANES)
            for (int64_t lane = 0; lane < LANES; ++lane)
                sums[lane] += (number(outputs[at + lane]) - number(inputs[at + lane])) * number(gradient[at + lane]);
        for (; at < end; ++at) sums[0] += (number(outputs[at]) - number(inputs[at])) * number(gradient[at]);
        for (float sum : sums) total += sum;
    }
    return total;
}

template <typename T>
void worth_of(const void* outputs, const void* inputs, const void* gradient, const int64_t* rows, int64_t count,
              int64_t numbers, float* worth, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = rows == nullptr ? i : rows[i];
        worth[i] = float(product(static_cast<const T*>(outputs) + i * numbers, static_cast<const T*>(inputs) + i * numbers,
                                 static_cast<const T*>(gradient) + row * numbers, numbers));
    }
}

}  // namespace

extern "C" {

void earlybird_merge(const char* rest, const char* values, const int64_t* rows, int64_t batch, int64_t count,
                     int64_t bytes, char* out, int threads) {
    std::vector<const char*> sources(batch);
    for (int64_t j = 0; j < batch; ++j) sources[j] = rest + j * bytes;
    for (int64_t i = 0; i < count; ++i) sources[rows[i]] = values + i * bytes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < batch; ++j) std::memcpy(out + j * bytes, sources[j], bytes);
}

// rows may be null: each row has the gradient of its own number
void earlybird_worth(const void* outputs, const void* inputs, const void* gradient, const int64_t* rows, int64_t count,
                     int64_t numbers, int brain, float* worth, int threads) {
    if (brain)
        worth_of<uint16_t>(outputs, inputs, gradient, rows, count, numbers, worth, threads);
    else
        worth_of<float>(outputs, inputs, gradient, rows, count, numbers, worth, threads);
}

}  // extern "C"
