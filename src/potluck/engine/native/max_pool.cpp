// 2 × 2 max pooling and ReLU, in one pass each way, of maps whose channels lie next to each other.
// `potluck.engine.native.max_pool` compiles it.
//
//     y = max(0, x_0, x_1, x_2, x_3)
//
// The gradient goes to the largest of the four, the first of equal ones, if it is above zero. What is not
// a number stays so. Maps are [num, height, width, channels] with even height and width, y and `which`
// [num, height / 2, width / 2, channels]; `which` is 0 to 3, or NONE.

#include <cstdint>
#include <cstring>

constexpr uint8_t NONE = 4;

static inline float value(float x) { return x; }

static inline float value(uint16_t x) {  // a bfloat16
    const uint32_t bits = uint32_t(x) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

static inline void put(float x, float* to) { *to = x; }

static inline void put(float x, uint16_t* to) {  // which was one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *to = uint16_t(bits >> 16);
}

template <class T>
static void forward(int64_t num, int height, int width, int channels, const T* maps, T* pooled,
                    uint8_t* which) {
    const int64_t row = int64_t(width) * channels;
    for (int64_t i = 0; i < num * (height / 2); i++)
        for (int j = 0; j < width / 2; j++) {
            const T *upper = maps + 2 * i * row + 2 * j * channels, *lower = upper + row;
            const int64_t at = (i * (width / 2) + j) * channels;
            for (int k = 0; k < channels; k++) {
                float best = value(upper[k]);
                int place = 0;
                const float others[3] = {value(upper[channels + k]), value(lower[k]),
                                         value(lower[channels + k])};
                for (int p = 0; p < 3; p++) {
                    const bool larger = (others[p] > best) | (others[p] != others[p]);
                    best = larger ? others[p] : best;
                    place = larger ? p + 1 : place;
                }
                const bool none = best <= 0.0f;
                put(none ? 0.0f : best, pooled + at + k);
                which[at + k] = none ? NONE : uint8_t(place);
            }
        }
}

// the gradients of four places from that of their pool
template <class T>
static inline void spread(int channels, const T* __restrict into, const uint8_t* __restrict which,
                          T* __restrict x0, T* __restrict x1, T* __restrict x2, T* __restrict x3) {
    for (int k = 0; k < channels; k++) {
        const T gradient = into[k], place = which[k];  // of one width, so that lanes fit
        x0[k] = place == T(0) ? gradient : T(0);
        x1[k] = place == T(1) ? gradient : T(0);
        x2[k] = place == T(2) ? gradient : T(0);
        x3[k] = place == T(3) ? gradient : T(0);
    }
}

template <class T>
static void backward(int64_t num, int height, int width, int channels, const T* into,
                     const uint8_t* which, T* onward) {
    const int64_t row = int64_t(width) * channels;
    for (int64_t i = 0; i < num * (height / 2); i++)
        for (int j = 0; j < width / 2; j++) {
            T *upper = onward + 2 * i * row + 2 * j * channels, *lower = upper + row;
            const int64_t at = (i * (width / 2) + j) * channels;
            spread(channels, into + at, which + at, upper, upper + channels, lower, lower + channels);
        }
}

extern "C" {

decltype(&forward<float>) forward_float32 = forward<float>;
decltype(&backward<float>) backward_float32 = backward<float>;
decltype(&forward<uint16_t>) forward_bfloat16 = forward<uint16_t>;
decltype(&backward<uint16_t>) backward_bfloat16 = backward<uint16_t>;

}  // extern "C"
